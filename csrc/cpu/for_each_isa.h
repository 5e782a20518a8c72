// Includes CCP_KERNELS once per instruction set, with the namespace's name in CCP_ISA and the
// width of its vector registers in CCP_VECTOR_BYTES. No include guard: one use per kernel source.
#define CCP_ISA baseline
#define CCP_VECTOR_BYTES 16
#include CCP_KERNELS
#undef CCP_ISA
#undef CCP_VECTOR_BYTES

#ifdef CCP_MULTI_ISA

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define CCP_ISA avx2
#define CCP_VECTOR_BYTES 32
#include CCP_KERNELS
#undef CCP_ISA
#undef CCP_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define CCP_ISA avx512
#define CCP_VECTOR_BYTES 64
#include CCP_KERNELS
#undef CCP_ISA
#undef CCP_VECTOR_BYTES
#pragma GCC pop_options

#endif
#undef CCP_KERNELS
