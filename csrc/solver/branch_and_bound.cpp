#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "branching.h"
#include "core.h"
#include "kernels.h"
#include "problem.h"
#include "relaxation.h"
#include "rounding.h"
#include "swap.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRelaxedPrecision = 1e-4;

double weight_of(const Problem& problem, const Mask& mask) {
  double total = 0;
  for (Index i = 0; i < problem.size; ++i) total += mask[i] ? problem.weight[i] : 0;
  return total;
}

Relaxation without_last(const Relaxation& inner, Index removed) {
  const Index size = inner.size - removed;
  return {size,
          inner.quadratic,
          inner.stride,
          {inner.linear.begin(), inner.linear.begin() + size},
          {inner.capacity.begin(), inner.capacity.begin() + size},
          inner.total};
}

// Fixes the last channel, which `child` lacks, at one; returns what it costs by itself.
double fix_last_at_one(const Relaxation& inner, Relaxation& child) {
  const Index last = child.size;
  const double weight = inner.capacity[last];
  rows.add(last, weight, inner.row(last), child.linear.data());
  child.total -= weight;
  return weight * (inner.linear[last] + 0.5 * weight * inner.row(last)[last]);
}

bool feasible(const Relaxation& relaxation) {
  const std::vector<double>& capacity = relaxation.capacity;
  const double most = std::accumulate(capacity.begin(), capacity.end(), 0.0);
  return 0 <= relaxation.total && relaxation.total <= most;
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

// The relaxation of the channels that `state` leaves free.
struct Root {
  double bound;
  std::vector<double> gradient;
  std::vector<double> capacity;
  double total;
  std::vector<char> state;
};

// The open channels of a node. Those that the branching fixes come last.
struct Open {
  std::vector<Index> channels;  // of the core
  std::vector<double> x;
  std::vector<double> response;  // to a unit of the branching channel

  void move_to(Index place, Index channel) {
    const Index k = std::find(channels.begin(), channels.end(), channel) - channels.begin();
    std::swap(channels[k], channels[place]);
    std::swap(x[k], x[place]);
    std::swap(response[k], response[place]);
  }
};

class Search {
 public:
  Search(const Problem& problem, Index r, double defect, const Known& known, const Limits& limits,
         std::uint64_t seed, const Report& report, const Checkpoint& checkpoint)
      : problem_(problem),
        r_(r),
        limits_(limits),
        seed_(seed),
        report_(report),
        checkpoint_(checkpoint),
        expired_([this] {
          checkpoint_();
          return std::chrono::steady_clock::now() >= limits_.deadline;
        }),
        bound_(known.lower_bound),
        state_(known.state),
        swaps_(problem) {
    if (!known.mask.empty()) consider(known.mask);
    if (state_.empty()) state_.assign(problem.size, kFree);
    double rounding = 0;
    for (double error : gradient_error(problem)) rounding += error;
    const double heaviest =
        problem.size ? *std::max_element(problem.weight.begin(), problem.weight.end()) : 1;
    const double total = std::accumulate(problem.weight.begin(), problem.weight.end(), 0.0);
    // Constant, linear terms, gradient and dual value of a node each err by no more than the total.
    // Twice that where dividing by the weights rounds, too.
    slack_ = (heaviest == 1 ? 4 : 8) * rounding + defect * heaviest * std::min(1.0 * r, total - r);
    tolerance_ = std::max(2 * slack_ + 4 * rounding, known.tolerance);
  }

  Certified run() {
    if (best_.empty()) start();
    solve_root(0.25 * limits_.gap);
    if (bound_ < cutoff()) search();
    return {best_, std::min(bound_, least_), bound_ >= cutoff(), tolerance_, expanded_, state_};
  }

  double bound() {
    solve_root(kBoundPrecision * std::abs(least_ - problem_.constant));
    return bound_;
  }

  Mask round() {
    start();
    solve_root(kRoundedPrecision * std::abs(least_ - problem_.constant));
    return best_;
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

  void start() {
    if (all_ones(problem_.weight)) {
      for (const Mask& mask : greedy(problem_, r_, checkpoint_)) {
        consider(problem_.size > kLargestPolished ? mask : swaps_.run(mask, checkpoint_));
      }
      return;
    }
    std::vector<double> alone(problem_.size);
    for (Index i = 0; i < problem_.size; ++i) {
      alone[i] = 0.5 * problem_.diagonal(i) - problem_.linear[i];
    }
    const Mask mask = least_scores(alone, problem_.weight, r_, kMostRoundedAtRoot);
    if (mask.empty()) throw std::invalid_argument("no mask of this weight was found");
    if (!mask.empty()) consider(swaps_.run(mask, checkpoint_));
  }

  // The relaxation of the free channels: a bound, channels that it decides, and a rounded mask.
  void solve_root(double precision) {
    const bool whole = std::count(state_.begin(), state_.end(), kFree) == problem_.size;
    if (!whole) core_ = solver::make_core(problem_, state_, r_);
    Relaxation relaxation =
        whole ? relaxation_of(problem_, r_, core_.scaled) : std::move(core_.relaxation);
    if (!feasible(relaxation)) {
      bound_ = std::max(bound_, cutoff());
      return;
    }
    root_x_.resize(problem_.size);
    std::vector<double> x;
    for (Index i = 0; i < problem_.size; ++i) {
      root_x_[i] = problem_.weight[i] * (state_[i] == kFree ? best_[i] : state_[i]);
      if (state_[i] == kFree) x.push_back(root_x_[i]);
    }
    const double constant = whole ? problem_.constant : core_.problem.constant;
    const Relaxed root =
        relax(relaxation, std::move(x), {kInfinity, std::max(tolerance_, precision), expired_});
    for (Index i = 0, k = 0; i < problem_.size; ++i) {
      if (state_[i] == kFree) root_x_[i] = root.x[k++];
    }
    consider_rounded();
    root_ = {constant + root.bound - slack_, root.gradient, relaxation.capacity, relaxation.total,
             state_};
    bound_ = std::max(bound_, whole ? root_.bound : std::min(root_.bound, cutoff()));
  }

  void consider_rounded() {
    std::vector<double> distance(problem_.weight);  // from the mask's entries, as they are set
    for (Index i = 0; i < problem_.size; ++i) distance[i] -= 2 * root_x_[i];
    const Mask mask = least_scores(distance, problem_.weight, r_, kMostRoundedAtRoot);
    consider(swaps_.run(mask, checkpoint_));
  }

  // What the best mask so far lets the root decide.
  void make_core() {
    const std::vector<char> decided =
        reduced_cost_fixing(root_.gradient, root_.capacity, root_.total, cutoff() - root_.bound);
    for (Index i = 0, k = 0; i < problem_.size; ++i) {
      if (root_.state[i] == kFree) state_[i] = decided[k++];
    }
    core_ = solver::make_core(problem_, state_, r_);
    core_swaps_ = std::make_unique<SwapDescent>(core_.problem);
  }

  void search() {
    make_core();
    const double before = least_;
    const bool hopeless = core_.problem.size > kLargestSearched;
    const std::int64_t most = limits_.nodes == 0 ? 1 : hopeless ? kLongest : kMostUnits;
    const int patience = core_.problem.size > kLargestFinished ? 2 : 1;
    int vain = 0;  // annealings in a row
    for (std::int64_t units = hopeless ? most : 1; units <= most && vain < patience; units *= 2) {
      const double least = least_;
      anneal_core(units);
      vain = least_ == least ? vain + 1 : 0;
    }
    if (least_ < before) make_core();
    if (core_.channels.empty()) {
      if (core_.relaxation.total == 0) consider(core_.fixed);
      bound_ = std::max(bound_, cutoff());
      return;
    }
    Node first{bound_, 0, std::vector<char>(core_.problem.size, kFree), {}};
    for (Index i : core_.channels) first.x.push_back(static_cast<float>(root_x_[i]));
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
      if (report_ && expanded_ % kReporting == 0) report_(least_, lowest_open());
      const bool power_of_two = (expanded_ & (expanded_ - 1)) == 0;
      if (power_of_two && effort() >= 1) anneal_core(effort());
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

  // What the nodes so far have cost, in units of one annealing.
  std::int64_t effort() const {
    return expanded_ * core_.problem.size * core_.problem.size / kNodesWorthAnnealing;
  }

  void anneal_core(std::int64_t units) {
    const Mask start = inner(best_);
    if (weight_of(core_.problem, start) != core_.relaxation.total) return;
    const std::int64_t proposals = units * kProposals * core_.problem.size;
    const Mask found =
        anneal(core_.problem, start, proposals, seed_ + expanded_, limits_.deadline, expired_);
    consider(outer(core_swaps_->run(found, checkpoint_)));
  }

  // Two children: the first open one of the branching channel's twins at one, and all of them at
  // zero. That leaves out masks that differ by an exchange of twins only.
  void expand(const Node& node) {
    const Relaxation& whole = core_.relaxation;
    Open open;
    Mask fixed(whole.size, 0);
    for (Index i = 0; i < whole.size; ++i) {
      if (node.state[i] == kFree) {
        open.channels.push_back(i);
        open.x.push_back(node.x[i]);
      } else {
        fixed[i] = node.state[i];
      }
    }
    Branching branching = choose_branching(whole, open.channels, open.x);
    const Index chosen = open.channels[branching.position];
    const double middle = open.x[branching.position];
    open.response = std::move(branching.response);
    Index end = static_cast<Index>(open.channels.size());
    for (Index twin : core_.twins[chosen]) {
      if (node.state[twin] == kFree) open.move_to(--end, twin);
    }
    const Index twins = static_cast<Index>(open.channels.size()) - end;
    const double constant = objective(core_.problem, fixed);
    const Relaxation inner = restrict(whole, open.channels, fixed, storage_);
    const double weight = whole.capacity[chosen];
    const bool likelier = middle >= 0.5 * weight;
    for (const bool value : {likelier, !likelier}) {
      std::vector<char> state = node.state;
      const Index decided = value ? 1 : twins;
      for (Index k = 1; k <= decided; ++k) state[open.channels[inner.size - k]] = value;
      Relaxation child = without_last(inner, decided);
      const double offset = constant + (value ? fix_last_at_one(inner, child) : 0);
      if (!feasible(child)) continue;
      std::vector<double> start(child.size);
      for (Index k = 0; k < child.size; ++k) {
        const double moved = open.x[k] + ((value ? weight : 0) - middle) * open.response[k];
        start[k] = std::clamp(moved, 0.0, child.capacity[k]);
      }
      visit(std::move(child), offset, std::move(start), open.channels, node.bound,
            std::move(state));
      if (interrupted_) return;
    }
  }

  // Bounds one child; keeps it if it may hold something better than the best known mask.
  void visit(Relaxation relaxation, double offset, std::vector<double> start,
             const std::vector<Index>& free, double inherited, std::vector<char> state) {
    const double target = cutoff() - offset + slack_;
    PairwiseDescent descent(std::move(relaxation), std::move(start));
    descent.run({target, tolerance_, expired_});
    const Relaxed relaxed = descent.finish();
    if (std::chrono::steady_clock::now() >= limits_.deadline) {
      interrupted_ = true;
      return;
    }
    const Relaxation& inner = descent.problem();
    const double reached = offset + relaxed.bound - slack_;
    const double bound = std::max(inherited, reached);
    if (bound >= cutoff()) return;
    const std::vector<char> decided =
        reduced_cost_fixing(relaxed.gradient, inner.capacity, inner.total, cutoff() - reached);
    std::vector<float> kept(core_.problem.size);
    bool any_free = false;
    for (Index k = 0; k < inner.size; ++k) {
      state[free[k]] = decided[k];
      kept[free[k]] = static_cast<float>(relaxed.x[k]);
      any_free |= decided[k] == kFree;
    }
    if (any_free) {
      if (++made_ % kRounding == 0 || made_ < kRounding) round(inner, free, relaxed.x, state);
      keep({bound, made_, std::move(state), std::move(kept)});
      return;
    }
    Mask mask(core_.problem.size);
    for (Index i = 0; i < core_.problem.size; ++i) mask[i] = state[i] == 1;
    if (weight_of(core_.problem, mask) == core_.relaxation.total) consider(outer(mask));
  }

  void round(const Relaxation& inner, const std::vector<Index>& free, const std::vector<double>& x,
             const std::vector<char>& state) {
    std::vector<double> distance(inner.capacity);
    for (Index k = 0; k < inner.size; ++k) distance[k] -= 2 * x[k];
    const Mask part =
        least_scores(distance, inner.capacity, static_cast<Index>(inner.total), kMostRoundedAtNode);
    if (part.empty()) return;
    Mask mask(core_.problem.size);
    for (Index i = 0; i < core_.problem.size; ++i) mask[i] = state[i] == 1;
    for (Index k = 0; k < inner.size; ++k) mask[free[k]] = part[k];
    consider(outer(core_swaps_->run(mask, checkpoint_)));
  }

  static constexpr std::size_t kMostBytes = std::size_t{1} << 30;
  static constexpr Index kLargestPolished = 256;  // beyond, rounding alone is worth the swaps
  static constexpr Index kMostRoundedAtRoot = Index{1} << 31;
  static constexpr Index kMostRoundedAtNode = Index{1} << 18;
  static constexpr double kRoundedPrecision = 1e-3;  // of the cost
  static constexpr double kBoundPrecision = 1e-5;
  static constexpr std::int64_t kProposals = 2000;  // a channel, for a unit of annealing
  static constexpr std::int64_t kMostUnits = 64;    // before the search
  static constexpr Index kLargestFinished = 192;    // mostly within a second
  static constexpr Index kLargestSearched = 1024;   // more channels leave no time for nodes
  static constexpr std::int64_t kLongest = 1024;    // before their search
  static constexpr std::int64_t kRounding = 32;
  static constexpr std::int64_t kNodesWorthAnnealing = 1 << 25;  // times the squared channels
  static constexpr std::int64_t kReporting = 64;

  const Problem& problem_;
  const Index r_;
  const Limits limits_;
  const std::uint64_t seed_;
  const Report report_;
  const Checkpoint& checkpoint_;
  const Expired expired_;
  double slack_;
  double tolerance_;
  double least_ = kInfinity;
  double bound_;
  Mask best_;
  std::vector<char> state_;
  Root root_;
  std::vector<double> root_x_;  // of all channels
  SwapDescent swaps_;
  Core core_;
  std::unique_ptr<SwapDescent> core_swaps_;
  std::vector<Node> heap_;
  std::vector<Node> stack_;
  std::int64_t expanded_ = 0;
  std::int64_t made_ = 0;
  bool interrupted_ = false;
  std::vector<double> storage_;
};

}  // namespace

Certified branch_and_bound(const Problem& problem, Index r, double defect, const Known& known,
                           const Limits& limits, std::uint64_t seed, const Report& report,
                           const Checkpoint& checkpoint) {
  return Search(problem, r, defect, known, limits, seed, report, checkpoint).run();
}

double relaxation_bound(const Problem& problem, Index r, double defect, const Mask& start,
                        const Checkpoint& checkpoint) {
  const Known known{start, {}, -kInfinity, 0};
  const Limits limits{std::chrono::steady_clock::time_point::max(), 0, 0};
  return Search(problem, r, defect, known, limits, 0, nullptr, checkpoint).bound();
}

Mask round_relaxation(const Problem& problem, Index r, const Limits& limits,
                      const Checkpoint& checkpoint) {
  const Known nothing{{}, {}, -kInfinity, 0};
  return Search(problem, r, 0, nothing, limits, 0, nullptr, checkpoint).round();
}

std::vector<double> relaxed_minimum(const Problem& problem, Index r, std::vector<double> start,
                                    const Checkpoint& checkpoint) {
  std::vector<double> scaled;
  for (Index i = 0; i < problem.size; ++i) start[i] *= problem.weight[i];
  PairwiseDescent descent(relaxation_of(problem, r, scaled), std::move(start));
  const Expired never = [&] {
    checkpoint();
    return false;
  };
  descent.run({kInfinity, kRelaxedPrecision * std::abs(descent.conjugate()), never});
  std::vector<double> x = descent.x();
  for (Index i = 0; i < problem.size; ++i) x[i] /= problem.weight[i];
  return x;
}

}  // namespace ccp::solver
