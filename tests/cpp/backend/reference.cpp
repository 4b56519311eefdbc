#include "reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace reference {
namespace {

using Row = std::vector<double>;
using Table = std::vector<Row>;

struct Grid {
  int64_t s, t, block_q, block_k, tiles, blocks;
  explicit Grid(const sa_problem &p)
      : s(p.queries), t(p.keys), block_q(p.block_q), block_k(p.block_k), tiles((s + block_q - 1) / block_q), blocks((t + block_k - 1) / block_k) {}
  int64_t position(int64_t row) const { return t - s + row; }
  int64_t first(int64_t tile) const { return position(tile * block_q); }
  int64_t last(int64_t tile) const { return std::min(first(tile) + block_q, t) - 1; }
  int64_t block_first(int64_t block) const { return block * block_k; }
  int64_t block_last(int64_t block) const { return std::min(block_first(block) + block_k, t) - 1; }
};

bool is_full(const sa_problem &p, double alpha, double alpha_slash) {
  return p.policy == SA_DENSE || alpha == 1 || (p.policy == SA_COLUMN_SLASH && alpha_slash == 1) || p.keys < p.min_length || p.queries <= 16;
}

std::vector<bool> sampled_rows(const Grid &g, const sa_problem &p) {
  std::vector<bool> rows(g.s, p.policy == SA_RESIDUE);
  if (p.policy == SA_TILE) {
    for (int64_t tile = 0; tile < g.tiles; ++tile)
      for (int64_t row = g.last(tile) - (g.t - g.s); row >= tile * g.block_q; row -= g.block_q / p.sample_rows) rows[row] = true;
  } else if (p.policy == SA_COLUMN_SLASH) {
    for (int64_t end = g.s; end > 0; end -= p.segment)
      for (int64_t row = std::max<int64_t>(end - p.sample_rows, 0); row < end; ++row) rows[row] = true;
  } else if (p.policy == SA_STRIPE_WINDOW) {
    const auto step = static_cast<int64_t>(std::min(std::nearbyint(1.0f / p.sample_ratio), 1073741824.0f));
    for (int64_t row = g.s - 1; row >= 0; row -= step) rows[row] = true;
  }
  return rows;
}

double score(const Inputs &in, const double *query, const double *key) {
  double sum = 0;
  for (int d = 0; d < in.problem.head_dim; ++d) sum += query[d] * key[d];
  sum *= in.problem.scale;
  const double cap = in.problem.softcap;
  return cap > 0 ? cap * std::tanh(sum / cap) : sum;
}

// Over the true entries; zeros without any.
void softmax(Row &scores, const std::vector<bool> &where) {
  double top = -INFINITY, total = 0;
  for (size_t j = 0; j < scores.size(); ++j)
    if (where[j]) top = std::max(top, scores[j]);
  for (size_t j = 0; j < scores.size(); ++j) {
    scores[j] = where[j] ? std::exp(scores[j] - top) : 0;
    total += scores[j];
  }
  if (total > 0)
    for (double &x : scores) x /= total;
}

double sum(const Row &x) { return std::accumulate(x.begin(), x.end(), 0.0); }

Row normalised(Row x) {
  const double total = sum(x);
  if (total > 0)
    for (double &v : x) v /= total;
  return x;
}

// The smallest set that reaches alpha, largest mass first, ties to the lower index; it ends after `room` blocks at the latest.
std::vector<bool> smallest_set(const Row &mass, double alpha, int64_t room = INT64_MAX) {
  std::vector<size_t> order(mass.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return mass[a] > mass[b]; });
  std::vector<bool> kept(mass.size());
  double before = 0;
  for (size_t index : order) {
    kept[index] = before < alpha && room-- > 0;
    before += mass[index];
  }
  return kept;
}

struct Head {
  const Inputs &in;
  const Grid &g;
  const std::vector<bool> &real;     // [T]
  const std::vector<bool> &sampled;  // [S]
  const double *query, *key, *value;
  double alpha, alpha_slash;

  Row scores(int64_t row) const {
    Row out(g.t);
    for (int64_t j = 0; j < g.t; ++j) out[j] = score(in, query + row * in.problem.head_dim, key + j * in.problem.head_dim);
    return out;
  }

  // [tiles][blocks] kept blocks, and the certificate of this head.
  std::vector<std::vector<bool>> select(double *certificate) const {
    const sa_problem &p = in.problem;
    const bool per_tile = p.policy == SA_RESIDUE || p.policy == SA_TILE;
    const bool full = is_full(p, alpha, alpha_slash);
    Table probability(g.s);
    Table tile_mass(g.tiles, Row(g.blocks));
    Row columns(g.blocks), slashes(g.blocks);
    Row weight(g.t, 1.0);
    if (p.value_weight != 0)
      for (int64_t j = 0; j < g.t; ++j) {
        double squares = 0;
        for (int d = 0; d < p.value_dim; ++d) squares += std::pow(value[j * p.value_dim + d], 2);
        weight[j] = std::sqrt(squares);
      }
    std::vector<bool> has_sample(g.s);
    for (int64_t row = 0; row < g.s; ++row) {
      const int64_t position = g.position(row);
      std::vector<bool> looked(g.t);
      if (sampled[row] && real[position])
        for (int64_t j = 0; j <= position; ++j) looked[j] = real[j] && (p.policy != SA_RESIDUE || (position + j) % p.stride == 0);
      has_sample[row] = std::find(looked.begin(), looked.end(), true) != looked.end();
      if (!has_sample[row]) continue;
      probability[row] = scores(row);
      softmax(probability[row], looked);
      for (int64_t j = 0; j <= position; ++j) {
        const double x = probability[row][j];
        tile_mass[row / g.block_q][j / g.block_k] += x * weight[j];
        columns[j / g.block_k] += x;
        slashes[(position - j) / g.block_k] += x;
      }
    }
    columns = normalised(columns);
    slashes = normalised(slashes);

    const auto first_real = std::find(real.begin(), real.end(), true) - real.begin();
    const auto end_real = real.rend() - std::find(real.rbegin(), real.rend(), true);
    int64_t window = p.window;
    if (p.policy == SA_STRIPE_WINDOW) window = std::max<int64_t>(window, static_cast<int64_t>(std::ceil(p.window_ratio * static_cast<float>(g.t))));
    const std::vector<bool> column_set = smallest_set(columns, alpha), slash_set = smallest_set(slashes, alpha_slash);
    std::vector<std::vector<bool>> kept(g.tiles, std::vector<bool>(g.blocks));
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
      std::vector<bool> forced(g.blocks);
      Row free = tile_mass[tile];
      int64_t begun = 0, forced_begun = 0;  // blocks that begin at or before the tile's last row
      for (int64_t block = 0; block < g.blocks; ++block) {
        const bool near = g.block_last(block) >= g.first(tile) - window && g.block_first(block) <= g.last(tile);
        const bool sink = p.sink > 0 && g.block_last(block) >= first_real && g.block_first(block) < first_real + p.sink;
        forced[block] = near || sink;
        if (forced[block]) free[block] = 0;
        if (g.block_first(block) > g.last(tile)) continue;
        begun += 1;
        forced_begun += forced[block] ? 1 : 0;
      }
      const int64_t budget = p.max_density < 1 ? static_cast<int64_t>(std::ceil(p.max_density * static_cast<float>(begun))) : begun;
      const std::vector<bool> tile_set = smallest_set(normalised(free), alpha, budget - forced_begun);
      const bool evidence = sum(per_tile ? tile_mass[tile] : columns) > 0;
      const bool dense = p.dense_rows > 0 && g.last(tile) >= end_real - p.dense_rows && g.first(tile) < end_real;
      for (int64_t block = 0; block < g.blocks; ++block) {
        bool keep = forced[block] || (per_tile ? tile_set[block] && free[block] > 0 : column_set[block]);
        if (p.policy == SA_COLUMN_SLASH) {
          const int64_t nearest = std::max<int64_t>(g.first(tile) - g.block_last(block), 0) / g.block_k;
          const int64_t farthest = g.last(tile) < g.block_first(block) ? -1 : (g.last(tile) - g.block_first(block)) / g.block_k;
          for (int64_t u = nearest; u <= farthest; ++u) keep = keep || slash_set[u];
        }
        kept[tile][block] = (keep || !evidence || dense || full) && g.block_first(block) <= g.last(tile);
      }
    }

    double low = 1, total = 0;
    int64_t rows = 0;
    for (int64_t row = 0; row < g.s; ++row) {
      if (!has_sample[row]) continue;
      double retained = 0;
      for (int64_t j = 0; j < g.t; ++j)
        if (kept[row / g.block_q][j / g.block_k]) retained += probability[row][j];
      low = std::min(low, retained);
      total += retained;
      ++rows;
    }
    certificate[0] = full || rows == 0 ? 1 : low;
    certificate[1] = full || rows == 0 ? 1 : total / rows;
    return kept;
  }

  void attend(const std::vector<std::vector<bool>> &kept, double *output) const {
    const int value_dim = in.problem.value_dim;
    for (int64_t row = 0; row < g.s; ++row) {
      std::vector<bool> allowed(g.t);
      for (int64_t j = 0; j <= g.position(row); ++j) allowed[j] = real[j] && kept[row / g.block_q][j / g.block_k];
      Row probability = scores(row);
      softmax(probability, allowed);
      for (int d = 0; d < value_dim; ++d) {
        double x = 0;
        // A key that is not read must not matter, whatever it holds.
        for (int64_t j = 0; j < g.t; ++j)
          if (allowed[j]) x += probability[j] * value[j * value_dim + d];
        output[row * value_dim + d] = x;
      }
    }
  }
};

}  // namespace

Outputs sample_attention(const Inputs &in) {
  const sa_problem &p = in.problem;
  const Grid g(p);
  const std::vector<bool> sampled = sampled_rows(g, p);
  Outputs out;
  out.output.resize(int64_t(p.batch) * p.heads * p.queries * p.value_dim);
  out.certificate.resize(int64_t(p.batch) * p.heads * 2);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<bool> real(g.t, true);
    if (!in.key_mask.empty())
      for (int64_t j = 0; j < g.t; ++j) real[j] = in.key_mask[b * g.t + j] != 0;
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t query_head = b * p.heads + h, key_head = b * p.kv_heads + h * p.kv_heads / p.heads;
      const Head head{in,
                      g,
                      real,
                      sampled,
                      in.query.data() + query_head * g.s * p.head_dim,
                      in.key.data() + key_head * g.t * p.head_dim,
                      in.value.data() + key_head * g.t * p.value_dim,
                      in.alpha[h],
                      in.alpha_slash[h]};
      const auto kept = head.select(out.certificate.data() + query_head * 2);
      for (const auto &tile : kept) out.kept.insert(out.kept.end(), tile.begin(), tile.end());
      head.attend(kept, out.output.data() + query_head * g.s * p.value_dim);
    }
  }
  return out;
}

}  // namespace reference
