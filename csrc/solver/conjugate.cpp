#include "conjugate.h"

namespace ccp::solver {

namespace {

struct Vertex {
  double point, value;
};

// The vertices of the lower convex hull of the points (points[j], values[j]), from left to right.
void lower_hull(const double* values, const std::vector<double>& points,
                std::vector<Vertex>& hull) {
  hull.clear();
  for (std::size_t j = 0; j < points.size(); ++j) {
    const Vertex next{points[j], values[j]};
    while (hull.size() > 1) {
      const Vertex& last = hull.back();
      const Vertex& before = hull[hull.size() - 2];
      const double to_last = (last.value - before.value) * (next.point - before.point);
      const double to_next = (next.value - before.value) * (last.point - before.point);
      if (to_last < to_next) break;
      hull.pop_back();
    }
    hull.push_back(next);
  }
}

}  // namespace

void conjugate(const double* values, const std::vector<double>& points, Index repeat,
               const std::vector<double>& offset, const std::vector<double>& step, double* result) {
  std::vector<Vertex> hull;
  for (std::size_t i = 0; i < offset.size(); ++i) {
    const std::size_t row = i / repeat;
    if (i % repeat == 0) lower_hull(values + row * points.size(), points, hull);
    // The steeper the line, the further left its minimum.
    std::size_t at = hull.size() - 1;
    for (std::size_t k = 0; k < step.size(); ++k) {
      const double slope = offset[i] + step[k];
      double least = hull[at].value + slope * hull[at].point;
      while (at > 0) {
        const double left = hull[at - 1].value + slope * hull[at - 1].point;
        if (left > least) break;
        least = left;
        --at;
      }
      result[i * step.size() + k] = least;
    }
  }
}

}  // namespace ccp::solver
