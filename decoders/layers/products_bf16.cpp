// Products of bfloat16 activations with linear layers' weights, for processors with AVX512-BF16: a linear layer, or a whole
// MLP, with the RMS norm before it.
//
// The instruction multiplies pairs of neighbouring features.  A weight's row holds its pairs side by side already, so weights
// are read where they lie, each pair spread over a register; it is the activations, a few MB, that are laid out anew:
// tiles of 64 tokens, in them the pairs of features in turn, in those the tokens.  6 output features times 64 tokens are 24 registers of
// sums.  What comes out has tokens side by side, which is the layout that the next product reads: an MLP's hidden
// layer is never written in any other.  Weights come from memory once for each chunk of at most CHUNK tokens; BLOCK x DEPTH pairs
// of them stay in the second cache while the chunk's tiles pass.
//
// Sums are float32 and so is all that follows them until the result is rounded. To the instructions what is below 2^-126 is 0.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

using bf16 = uint16_t;
using pair = uint32_t;  // two neighbouring features of one token, or of one row of weights

constexpr int64_t TILE = 64;     // tokens of a tile
constexpr int64_t VECTORS = 4;   // registers of 16 tokens in a tile
constexpr int64_t ROWS = 6;      // output features at a time
constexpr int64_t BLOCK = 192;   // output features of one task
constexpr int64_t CHUNK = 320;   // tokens of one task at most
constexpr int64_t DEPTH = 384;   // pairs that are summed before the next tile of tokens
constexpr int64_t TASKS = 4;     // of each thread at least
constexpr int64_t LINE = 16;     // pairs of a cache line

inline __m512 load(const float* at) { return _mm512_load_ps(at); }
inline __m512bh tokens(const pair* at) { return reinterpret_cast<__m512bh>(_mm512_load_si512(at)); }
inline __m512bh spread(pair value) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(value))); }

inline __m512 lower(__m512i pairs) { return reinterpret_cast<__m512>(_mm512_slli_epi32(pairs, 16)); }
inline __m512 upper(__m512i pairs) {
  return reinterpret_cast<__m512>(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
// first in the lower halves, second in the upper
inline __m512i paired(__m512 first, __m512 second) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// x / (1 + e^-y), e^-y with a relative error below 1e-5, where rounding to bfloat16 has up to 4e-3
inline __m512 gated_by(__m512 x, __m512 y) {
  __m512 power = _mm512_mul_ps(y, _mm512_set1_ps(-1.44269504089f));
  power = _mm512_min_ps(_mm512_max_ps(power, _mm512_set1_ps(-200.0f)), _mm512_set1_ps(200.0f));  // 0 and infinity
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(power, whole);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, whole)));
}

enum Activation { SWIGLU, SILU, GELU };  // GELU by its tanh: x (1 + tanh(y / 2)) / 2 = x / (1 + e^-y)

inline __m512 activated(__m512 x, int kind) {
  if (kind != GELU) return gated_by(x, x);
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  return gated_by(x, _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(1.59576912161f)));
}

// 16 rows of 16 to 16 columns
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[i], r[4+i], r[8+i], r[12+i] hold columns i, 4+i, 8+i, 12+i of four rows each
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
  std::memcpy(r, t, sizeof t);
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

// Tokens "m k" into tiles, 16 of them from `begin` on, with the norm before if there is a gain.
void lay_out(const bf16* x, int64_t stride, int64_t begin, int64_t count, int64_t pairs, const bf16* gain, float eps, pair* out) {
  const int64_t here = std::min<int64_t>(16, count - begin);
  __m512 inverse[16];
  if (gain)
    for (int64_t t = 0; t < here; ++t) {
      const bf16* row = x + (begin + t) * stride;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < pairs; k += 16) {
        const __m512i both = _mm512_maskz_loadu_epi32(first(pairs - k), row + 2 * k);
        sum = _mm512_fmadd_ps(lower(both), lower(both), _mm512_fmadd_ps(upper(both), upper(both), sum));
      }
      inverse[t] = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / (2.0f * pairs) + eps));
    }
  pair* to = out + begin / TILE * TILE * pairs + begin % TILE;
  for (int64_t k = 0; k < pairs; k += 16) {
    const __mmask16 known = first(pairs - k);
    __m512i rows[16];
    for (int64_t t = 0; t < 16; ++t)
      rows[t] = t < here ? _mm512_maskz_loadu_epi32(known, x + (begin + t) * stride + 2 * k) : _mm512_setzero_si512();
    if (gain) {
      const __m512i gains = _mm512_maskz_loadu_epi32(known, gain + 2 * k);
      for (int64_t t = 0; t < here; ++t)
        rows[t] = paired(_mm512_mul_ps(_mm512_mul_ps(lower(rows[t]), inverse[t]), lower(gains)),
                         _mm512_mul_ps(_mm512_mul_ps(upper(rows[t]), inverse[t]), upper(gains)));
    }
    transpose(rows);
    for (int64_t i = 0; i < std::min<int64_t>(16, pairs - k); ++i) _mm512_store_si512(to + (k + i) * TILE, rows[i]);
  }
}

// sums "R tokens" = bias, or where it is null what they were, plus `pairs` pairs of R rows of weights times a tile; `next`: rows
// to fetch meanwhile, or null.
template <int R, int V>
void multiply(const pair* tile, const pair* weight, int64_t stride, int64_t pairs, const pair* next, float* sums,
              int64_t sums_stride, const float* bias) {
  __m512 sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = bias ? _mm512_set1_ps(bias[r]) : load(sums + r * sums_stride + 16 * v);
  for (int64_t begin = 0; begin < pairs; begin += LINE) {
    if (next)
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(next + r * stride + begin), _MM_HINT_T1);
    const int64_t end = std::min(pairs, begin + LINE);
    for (int64_t k = begin; k < end; ++k) {
      __m512bh columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) columns[v] = tokens(tile + k * TILE + 16 * v);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512bh value = spread(weight[r * stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], columns[v], value);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_store_ps(sums + r * sums_stride + 16 * v, sum[r][v]);
}

using Multiply = void (*)(const pair*, const pair*, int64_t, int64_t, const pair*, float*, int64_t, const float*);
template <int R>
constexpr Multiply by_vectors[] = {multiply<R, 1>, multiply<R, 2>, multiply<R, 3>, multiply<R, 4>};
constexpr const Multiply* by_rows[] = {by_vectors<1>, by_vectors<2>, by_vectors<3>, by_vectors<4>, by_vectors<5>, by_vectors<6>};

// sums "rows CHUNK" of one task: all pairs of `rows` rows of weights times `count` tokens' tiles, and the rows' bias or null. Rows x
// DEPTH pairs of weights and a tile of as many stay in the second cache while they are used.
void task(const pair* tiles, int64_t count, const pair* weight, const bf16* bias, int64_t rows, int64_t pairs, float* sums) {
  float start[BLOCK] = {};
  for (int64_t row = 0; bias && row < rows; ++row) {
    const uint32_t wide = static_cast<uint32_t>(bias[row]) << 16;
    std::memcpy(start + row, &wide, sizeof wide);
  }
  for (int64_t depth = 0; depth < pairs; depth += DEPTH) {
    const int64_t deep = std::min(DEPTH, pairs - depth);
    for (int64_t token = 0; token < count; token += TILE) {
      const int64_t vectors = (std::min(TILE, count - token) + 15) / 16;
      const pair* tile = tiles + token * pairs + depth * TILE;
      for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t r = std::min(ROWS, rows - row);
        const pair* at = weight + row * pairs + depth;
        const pair* next = token ? nullptr : at + ROWS * pairs;
        by_rows[r - 1][vectors - 1](tile, at, pairs, deep, next, sums + row * CHUNK + token, CHUNK,
                                    depth ? nullptr : start + row);
      }
    }
  }
}

// sums "rows CHUNK", and what is added, to "count rows" whose lines are `n` apart
void write_rows(const float* sums, int64_t rows, int64_t count, const bf16* added, bf16* out, int64_t n) {
  for (int64_t row = 0; row < rows; row += 32) {
    const int64_t pairs = std::min<int64_t>(16, (rows - row) / 2);
    const __mmask16 known = first(pairs);
    for (int64_t t = 0; t < count; t += 16) {
      __m512i first_half[16], second_half[16];
      for (int64_t i = 0; i < 16; ++i) {
        const float* at = sums + (row + 2 * std::min(i, pairs - 1)) * CHUNK + t;
        first_half[i] = _mm512_load_si512(at), second_half[i] = _mm512_load_si512(at + CHUNK);
      }
      if (added) {
        transpose(first_half), transpose(second_half);
        for (int64_t i = 0; i < std::min<int64_t>(16, count - t); ++i) {
          const __m512i before = _mm512_maskz_loadu_epi32(known, added + (t + i) * n + row);
          const __m512 one = _mm512_add_ps(reinterpret_cast<__m512>(first_half[i]), lower(before));
          const __m512 two = _mm512_add_ps(reinterpret_cast<__m512>(second_half[i]), upper(before));
          _mm512_mask_storeu_epi32(out + (t + i) * n + row, known, paired(one, two));
        }
      } else {
        for (int64_t i = 0; i < 16; ++i)
          first_half[i] = paired(reinterpret_cast<__m512>(first_half[i]), reinterpret_cast<__m512>(second_half[i]));
        transpose(first_half);
        for (int64_t i = 0; i < std::min<int64_t>(16, count - t); ++i)
          _mm512_mask_storeu_epi32(out + (t + i) * n + row, known, first_half[i]);
      }
    }
  }
}

// How `m` tokens are shared out: chunks as equal as tiles allow, groups of chunks with enough tasks for all threads.
struct Plan {
  int64_t chunk, group;

  Plan(int64_t m, int64_t n, int64_t threads) {
    const int64_t chunks = (m + CHUNK - 1) / CHUNK, blocks = (n + BLOCK - 1) / BLOCK;
    chunk = ((m + chunks - 1) / chunks + TILE - 1) / TILE * TILE;
    group = chunk * ((TASKS * threads + blocks - 1) / blocks);
  }
};

alignas(64) thread_local float sums_of_task[BLOCK * CHUNK];

// out "m n" = tiles "m k" W^T, plus bias " n" and residual "m n" where there are any
void linear(const pair* tiles, int64_t m, int64_t chunk, int64_t pairs, const bf16* weight, const bf16* bias, int64_t n,
            const bf16* residual, bf16* out) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK, chunks = (m + chunk - 1) / chunk;
#pragma omp for schedule(static)
  for (int64_t unit = 0; unit < chunks * blocks; ++unit) {
    const int64_t token = unit / blocks * chunk, row = unit % blocks * BLOCK;
    const int64_t count = std::min(chunk, m - token), rows = std::min(BLOCK, n - row);
    task(tiles + token * pairs, count, reinterpret_cast<const pair*>(weight) + row * pairs, bias ? bias + row : nullptr, rows, pairs,
         sums_of_task);
    write_rows(sums_of_task, rows, count, residual ? residual + token * n + row : nullptr, out + token * n + row, n);
  }
}

// hidden tiles "m h" = activated(tiles W_up^T); SWIGLU: silu(tiles W_gate^T) * (tiles W_up^T), the gate's rows before those of up
void activate(const pair* tiles, int64_t m, int64_t chunk, int64_t pairs, const bf16* weight, const bf16* bias, int64_t hidden,
              int kind, pair* out) {
  const int64_t wide = kind == SWIGLU ? BLOCK / 2 : BLOCK;
  const int64_t blocks = (hidden + wide - 1) / wide, chunks = (m + chunk - 1) / chunk;
#pragma omp for schedule(static)
  for (int64_t unit = 0; unit < chunks * blocks; ++unit) {
    const int64_t token = unit / blocks * chunk, row = unit % blocks * wide;
    const int64_t count = std::min(chunk, m - token), rows = std::min(wide, hidden - row);
    float *sums = sums_of_task, *ups = sums + rows * CHUNK;
    const auto part = [&](int64_t begin, float* to) {
      task(tiles + token * pairs, count, reinterpret_cast<const pair*>(weight) + begin * pairs, bias ? bias + begin : nullptr, rows,
           pairs, to);
    };
    part(row, sums);
    if (kind == SWIGLU) part(hidden + row, ups);
    for (int64_t t = 0; t < count; t += 16) {
      pair* to = out + (token + t) / TILE * TILE * (hidden / 2) + row / 2 * TILE + t % TILE;
      for (int64_t r = 0; r < rows; r += 2) {
        __m512 one = activated(load(sums + r * CHUNK + t), kind), two = activated(load(sums + (r + 1) * CHUNK + t), kind);
        if (kind == SWIGLU) {
          one = _mm512_mul_ps(one, load(ups + r * CHUNK + t));
          two = _mm512_mul_ps(two, load(ups + (r + 1) * CHUNK + t));
        }
        _mm512_store_si512(to + r / 2 * TILE, paired(one, two));
      }
    }
  }
}

void lay_out_all(const bf16* x, int64_t m, int64_t stride, int64_t pairs, const bf16* gain, float eps, pair* tiles) {
#pragma omp for schedule(static)
  for (int64_t begin = 0; begin < m; begin += 16) lay_out(x, stride, begin, m, pairs, gain, eps, tiles);
}

// Memory of the calling thread for a group's tiles, kept from call to call: fresh pages cost more than the norms.
struct Workspace {
  pair* memory = nullptr;
  int64_t size = 0;

  pair* of(int64_t pairs) {
    if (pairs > size) {
      std::free(memory);
      size = 0;
      memory = static_cast<pair*>(std::aligned_alloc(4096, (pairs * sizeof(pair) + 4095) / 4096 * 4096));
      if (memory) size = pairs;
    }
    return memory;
  }
  ~Workspace() { std::free(memory); }
};
thread_local Workspace workspace;

int64_t whole_tiles(int64_t tokens) { return (tokens + TILE - 1) / TILE * TILE; }

}  // namespace

// x "m k" (rows `stride` apart), gain " k" or null, weight "n k", bias " n" or null, residual "m n" or null -> out "m n"; k and n
// even. Returns 1 where there is no memory.
extern "C" int linear_bf16(const bf16* x, const bf16* gain, float eps, const bf16* weight, const bf16* bias, const bf16* residual,
                           bf16* out, int64_t m, int64_t stride, int64_t k, int64_t n, int threads) {
  const Plan plan(m, n, threads);
  pair* tiles = workspace.of(whole_tiles(std::min(m, plan.group)) * (k / 2));
  if (!tiles) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t begin = 0; begin < m; begin += plan.group) {
    const int64_t here = std::min(plan.group, m - begin);
    lay_out_all(x + begin * stride, here, stride, k / 2, gain, eps, tiles);
    linear(tiles, here, plan.chunk, k / 2, weight, bias, n, residual ? residual + begin * n : nullptr, out + begin * n);
  }
  return 0;
}

// The same through a hidden layer: up "h k" (SWIGLU: gate and up, "2h k") with its bias or null, then down "n h" with its own; h
// even.
extern "C" int mlp_bf16(const bf16* x, const bf16* gain, float eps, const bf16* up, const bf16* up_bias, const bf16* down,
                        const bf16* down_bias, bf16* out, int64_t m, int64_t stride, int64_t k, int64_t hidden, int64_t n, int kind,
                        int threads) {
  const Plan plan(m, n, threads);
  const int64_t tokens = whole_tiles(std::min(m, plan.group));
  pair* tiles = workspace.of(tokens * (k / 2 + hidden / 2));
  if (!tiles) return 1;
  pair* hidden_tiles = tiles + tokens * (k / 2);
#pragma omp parallel num_threads(threads)
  for (int64_t begin = 0; begin < m; begin += plan.group) {
    const int64_t here = std::min(plan.group, m - begin);
    lay_out_all(x + begin * stride, here, stride, k / 2, gain, eps, tiles);
    activate(tiles, here, plan.chunk, k / 2, up, up_bias, hidden, kind, hidden_tiles);
    linear(hidden_tiles, here, plan.chunk, hidden / 2, down, down_bias, n, nullptr, out + begin * n);
  }
  return 0;
}
