#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>
#include <utility>

#include "branching.h"
#include "problem.h"
#include "relaxation.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The channels that a root bound leaves open, as a problem of their own.
struct Core {
  std::vector<double> quadratic;
  std::vector<Index> channels;  // of the whole problem
  Mask fixed;                   // the whole problem's mask with the core at 0
  Problem problem;              // points into `quadratic`, which keeps its place when moved
  Index ones;
};

// S and c among the free channels, given the channels fixed to one.
Relaxation restrict(const Problem& problem, const std::vector<Index>& free, const Mask& fixed,
                    Index ones, std::vector<double>& storage) {
  const Index size = static_cast<Index>(free.size());
  storage.resize(size * size);
  std::vector<double> linear(size);
  for (Index k = 0; k < size; ++k) linear[k] = -problem.linear[free[k]];
  for (Index i = 0; i < problem.size; ++i) {
    if (!fixed[i]) continue;
    const double* row = problem.row(i);
    for (Index k = 0; k < size; ++k) linear[k] += row[free[k]];
  }
  for (Index i = 0; i < size; ++i) {
    const double* row = problem.row(free[i]);
    for (Index k = 0; k < size; ++k) storage[i * size + k] = row[free[k]];
  }
  return {size, storage.data(), size, std::move(linear), ones};
}

Core make_core(const Problem& problem, const std::vector<char>& state, Index r) {
  Core core;
  core.fixed.assign(problem.size, 0);
  core.ones = r;
  for (Index i = 0; i < problem.size; ++i) {
    if (state[i] == kFree) core.channels.push_back(i);
    if (state[i] == 1) {
      core.fixed[i] = 1;
      --core.ones;
    }
  }
  const Relaxation inner = restrict(problem, core.channels, core.fixed, core.ones, core.quadratic);
  core.problem = {inner.size, core.quadratic.data(), inner.linear, objective(problem, core.fixed)};
  for (double& value : core.problem.linear) value = -value;
  return core;
}

// The positions of the largest entries; of equal ones, the first.
std::vector<Index> largest(const std::vector<double>& x, Index count) {
  std::vector<Index> order(x.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return x[a] > x[b]; });
  order.resize(count);
  return order;
}

struct Node {
  double bound;
  std::int64_t number;
  std::vector<char> state;  // of the core: 0, 1 or kFree
  std::vector<float> x;     // of the core's relaxation here

  bool operator<(const Node& other) const {  // the top of a heap: least bound, then first made
    return bound != other.bound ? bound > other.bound : number > other.number;
  }
};

class Search {
 public:
  Search(const Problem& problem, Index r, double defect, const Limits& limits, std::uint64_t seed,
         const Checkpoint& checkpoint)
      : problem_(problem),
        r_(r),
        limits_(limits),
        seed_(seed),
        checkpoint_(checkpoint),
        expired_([this] {
          checkpoint_();
          return std::chrono::steady_clock::now() >= limits_.deadline;
        }) {
    double rounding = 0;
    for (double error : gradient_error(problem)) rounding += error;
    // Constant, linear terms, gradient and dual value of a node each err by no more than the total.
    slack_ = 4 * rounding + defect * std::min(r, problem.size - r);
    tolerance_ = 2 * slack_ + 4 * rounding;
  }

  Certified run() {
    for (Mask& start : greedy(problem_, r_, checkpoint_)) {
      consider(swap_descent(problem_, std::move(start), checkpoint_));
    }
    const Relaxed root = solve_root();
    Mask rounded(problem_.size, 0);
    for (Index i : largest(root.x, r_)) rounded[i] = 1;
    consider(swap_descent(problem_, std::move(rounded), checkpoint_));
    if (bound_ < cutoff()) search(root);
    return {best_, std::min(bound_, least_), bound_ >= cutoff(), tolerance_, expanded_};
  }

 private:
  double cutoff() const { return least_ - std::max(limits_.gap, tolerance_); }

  void consider(const Mask& mask) {
    const double cost = objective(problem_, mask);
    if (cost < least_) {
      least_ = cost;
      best_ = mask;
    }
  }

  Relaxed solve_root() {
    Relaxation whole{problem_.size, problem_.quadratic, problem_.size, problem_.linear, r_};
    for (double& value : whole.linear) value = -value;
    const std::vector<double> start(best_.begin(), best_.end());
    Relaxed root = relax(whole, start, {kInfinity, tolerance_, expired_});
    bound_ = problem_.constant + root.bound - slack_;
    return root;
  }

  void search(const Relaxed& root) {
    core_ = make_core(problem_, reduced_cost_fixing(root.gradient, r_, cutoff() - bound_), r_);
    const double before = least_;
    anneal_core();
    if (least_ < before) {
      core_ = make_core(problem_, reduced_cost_fixing(root.gradient, r_, cutoff() - bound_), r_);
    }
    if (core_.channels.empty()) {
      if (core_.ones == 0) consider(core_.fixed);
      bound_ = std::max(bound_, cutoff());
      return;
    }
    Node first{bound_, 0, std::vector<char>(core_.problem.size, kFree), {}};
    for (Index i : core_.channels) first.x.push_back(static_cast<float>(root.x[i]));
    keep(std::move(first));
    while (lowest_open() < cutoff()) {
      if (expanded_ >= limits_.nodes || expired_()) break;
      Node node = take();
      expand(node);
      if (interrupted_) {
        keep(std::move(node));
        break;
      }
      ++expanded_;
      if (expanded_ >= kFirstRepeat && (expanded_ & (expanded_ - 1)) == 0) anneal_core();
    }
    bound_ = std::max(bound_, std::min(cutoff(), lowest_open()));
  }

  double lowest_open() const {
    double lowest = heap_.empty() ? kInfinity : heap_.front().bound;
    for (const Node& node : stack_) lowest = std::min(lowest, node.bound);
    return lowest;
  }

  // Best bound first, until the open nodes fill the memory; then also depth first.
  void keep(Node node) {
    const std::size_t bytes = sizeof(Node) + core_.problem.size * (sizeof(char) + sizeof(float));
    if (heap_.size() * bytes >= kMostBytes) {
      stack_.push_back(std::move(node));
    } else {
      heap_.push_back(std::move(node));
      std::push_heap(heap_.begin(), heap_.end());
    }
  }

  Node take() {
    std::vector<Node>& source = stack_.empty() ? heap_ : stack_;
    if (stack_.empty()) std::pop_heap(heap_.begin(), heap_.end());
    Node node = std::move(source.back());
    source.pop_back();
    return node;
  }

  // The core's part of a mask of the whole problem, and back.
  Mask inner(const Mask& mask) const {
    Mask part;
    for (Index i : core_.channels) part.push_back(mask[i]);
    return part;
  }
  Mask outer(const Mask& part) const {
    Mask mask = core_.fixed;
    for (std::size_t k = 0; k < part.size(); ++k) mask[core_.channels[k]] = part[k];
    return mask;
  }

  void anneal_core() {
    const Mask start = inner(best_);
    if (std::count(start.begin(), start.end(), char{1}) != core_.ones) return;
    const std::int64_t proposals = kProposals * core_.problem.size;
    const Mask found = anneal(core_.problem, start, proposals, seed_ + expanded_, expired_);
    consider(outer(swap_descent(core_.problem, found, checkpoint_)));
  }

  void expand(const Node& node) {
    std::vector<Index> free;
    std::vector<double> x;
    Mask fixed(core_.problem.size, 0);
    Index ones = core_.ones;
    for (Index i = 0; i < core_.problem.size; ++i) {
      if (node.state[i] == kFree) {
        free.push_back(i);
        x.push_back(node.x[i]);
      } else if (node.state[i] == 1) {
        fixed[i] = 1;
        --ones;
      }
    }
    Branching branching = choose_branching(core_.problem, free, x);
    std::swap(free[branching.position], free.back());
    std::swap(x[branching.position], x.back());
    std::swap(branching.response[branching.position], branching.response.back());
    const double constant = objective(core_.problem, fixed);
    Relaxation relaxation = restrict(core_.problem, free, fixed, ones, storage_);
    const Index last = --relaxation.size;
    const double likelier = x[last] >= 0.5 ? 1 : 0;
    std::vector<double> start(last);
    const std::vector<double> linear = relaxation.linear;
    for (double value : {likelier, 1 - likelier}) {
      relaxation.ones = ones - static_cast<Index>(value);
      if (relaxation.ones < 0 || relaxation.ones > relaxation.size) continue;
      double offset = constant;
      relaxation.linear.assign(linear.begin(), linear.end() - 1);
      if (value == 1) {
        const double* row = relaxation.row(last);
        for (Index k = 0; k < last; ++k) relaxation.linear[k] += row[k];
        offset += linear[last] + 0.5 * row[last];
      }
      for (Index k = 0; k < last; ++k) {
        start[k] = std::clamp(x[k] + (value - x[last]) * branching.response[k], 0.0, 1.0);
      }
      std::vector<char> state = node.state;
      state[free[last]] = static_cast<char>(value);
      visit(relaxation, offset, start, free, node.bound, std::move(state));
      if (interrupted_) return;
    }
  }

  // Bounds one child; keeps it if it may hold something better than the best known mask.
  void visit(const Relaxation& relaxation, double offset, std::vector<double> x,
             const std::vector<Index>& free, double inherited, std::vector<char> state) {
    const double target = cutoff() - offset + slack_;
    const Relaxed relaxed = relax(relaxation, std::move(x), {target, tolerance_, expired_});
    if (std::chrono::steady_clock::now() >= limits_.deadline) {
      interrupted_ = true;
      return;
    }
    const double bound = std::max(inherited, offset + relaxed.bound - slack_);
    if (bound >= cutoff()) return;
    const std::vector<char> decided = reduced_cost_fixing(
        relaxed.gradient, relaxation.ones, cutoff() - (offset + relaxed.bound - slack_));
    std::vector<float> kept(core_.problem.size);
    bool any_free = false;
    for (Index k = 0; k < relaxation.size; ++k) {
      state[free[k]] = decided[k];
      kept[free[k]] = static_cast<float>(relaxed.x[k]);
      any_free |= decided[k] == kFree;
    }
    Mask mask(core_.problem.size);
    for (Index i = 0; i < core_.problem.size; ++i) mask[i] = state[i] == 1;
    if (any_free) {
      if (++made_ % kRounding == 0 || made_ < kRounding) round(relaxation, free, relaxed.x, mask);
      keep({bound, made_, std::move(state), std::move(kept)});
    } else if (std::count(mask.begin(), mask.end(), char{1}) == core_.ones) {
      consider(outer(mask));
    }
  }

  void round(const Relaxation& relaxation, const std::vector<Index>& free,
             const std::vector<double>& x, const std::vector<char>& state) {
    Mask mask(core_.problem.size);
    for (Index i = 0; i < core_.problem.size; ++i) mask[i] = state[i] == 1;
    for (Index k = 0; k < relaxation.size; ++k) mask[free[k]] = 0;
    for (Index k : largest(x, relaxation.ones)) mask[free[k]] = 1;
    consider(outer(swap_descent(core_.problem, std::move(mask), checkpoint_)));
  }

  static constexpr std::size_t kMostBytes = std::size_t{1} << 30;
  static constexpr std::int64_t kProposals = 2000;
  static constexpr std::int64_t kRounding = 32;
  static constexpr std::int64_t kFirstRepeat = 1024;

  const Problem& problem_;
  const Index r_;
  const Limits limits_;
  const std::uint64_t seed_;
  const Checkpoint& checkpoint_;
  const Expired expired_;
  double slack_;
  double tolerance_;
  double least_ = kInfinity;
  double bound_ = -kInfinity;
  Mask best_;
  Core core_;
  std::vector<Node> heap_;
  std::vector<Node> stack_;
  std::int64_t expanded_ = 0;
  std::int64_t made_ = 0;
  bool interrupted_ = false;
  std::vector<double> storage_;
};

}  // namespace

Certified branch_and_bound(const Problem& problem, Index r, double defect, const Limits& limits,
                           std::uint64_t seed, const Checkpoint& checkpoint) {
  return Search(problem, r, defect, limits, seed, checkpoint).run();
}

}  // namespace ccp::solver
