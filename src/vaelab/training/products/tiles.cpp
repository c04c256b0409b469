// Products of bf16 matrices on a processor's tile units (AMX), one step of which is 16 x 32 numbers times 32 x 16: the
// operations vaelab::tile_product and vaelab::tile_affine. And what makes a product of a convolution: vaelab::windows,
// and its transpose, vaelab::spread.
//
// Both factors are first copied into tiles, one after the other, in the order in which they are read; whether a factor
// lies as its rows or as its columns matters in that copy alone. What does not fill a tile is filled with zeros.
// Sums are of fp32, and rounded once, to the nearest bf16.

#include <immintrin.h>
#include <sys/syscall.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using torch::stable::Tensor;
using Bits = uint16_t;  // of a bf16 number

constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;
constexpr int64_t kSerial = 4'000'000;  // multiplications: of fewer, waking another thread costs more than it saves

// A factor of a product A B, seen so that depth is summed over: A by its rows, B by its columns.
struct Factor {
  const Bits* data;
  int64_t sides, depths;  // how many rows (of B: columns), and how long each
  int64_t side, depth;    // numbers in memory from one to the next
  int64_t down() const { return (sides + kSide - 1) / kSide; }
  int64_t deep() const { return (depths + kDepth - 1) / kDepth; }
};

// --- from matrices to tiles ------------------------------------------------------------------------------------------

// The transpose of 16 x 16 numbers of 32 bits, in four rounds that double what lies together.
void transpose(__m512i rows[kSide]) {
  __m512i other[kSide];
  for (int i = 0; i < 8; i++) {
    other[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    other[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// A tile whose depth is contiguous: 16 rows of 32 numbers.
void load_sides(const Bits* from, int64_t stride, int64_t sides, int64_t depths, __m512i rows[kSide]) {
  const __mmask32 mask = depths >= kDepth ? ~0u : (1u << depths) - 1;
  for (int i = 0; i < kSide; i++)
    rows[i] = i < sides ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512();
}

// A tile whose sides are contiguous: 16 rows, each of 16 pairs of neighbours in depth.
void load_pairs(const Bits* from, int64_t stride, int64_t sides, int64_t depths, __m512i rows[kSide]) {
  const __mmask16 mask = sides >= kSide ? 0xffff : (1u << sides) - 1;
  const auto one = [&](int64_t k) {
    const __m256i found = k < depths ? _mm256_maskz_loadu_epi16(mask, from + k * stride) : _mm256_setzero_si256();
    return _mm512_cvtepu16_epi32(found);
  };
  for (int i = 0; i < kSide; i++) rows[i] = _mm512_or_si512(one(2 * i), _mm512_slli_epi32(one(2 * i + 1), 16));
}

// Tile (i, k) of a factor. The units want A's as 16 rows of 32 numbers, B's as 16 rows of 16 pairs: each is the other's
// transpose, taking a pair as one number.
void pack(const Factor& x, int64_t i, int64_t k, bool as_pairs, Bits* to) {
  __m512i rows[kSide];
  const Bits* from = x.data + i * kSide * x.side + k * kDepth * x.depth;
  const int64_t sides = x.sides - i * kSide, depths = x.depths - k * kDepth;
  const bool deep = x.depth == 1;
  if (deep)
    load_sides(from, x.side, sides, depths, rows);
  else
    load_pairs(from, x.depth, sides, depths, rows);
  if (deep == as_pairs) transpose(rows);
  for (int j = 0; j < kSide; j++) _mm512_store_si512(to + kDepth * j, rows[j]);
}

// --- the product -----------------------------------------------------------------------------------------------------

void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// A block of 2 x 2 tiles (of fewer at an edge), summed over all depths: out is 32 x 32.
template <bool two_down, bool two_right>
void multiply(const Bits* a, const Bits* b, int64_t deep, float* out) {
  const int64_t next = deep * kTile;
  _tile_zero(0);
  if constexpr (two_right) _tile_zero(1);
  if constexpr (two_down) _tile_zero(2);
  if constexpr (two_down && two_right) _tile_zero(3);
  for (int64_t k = 0; k < deep; k++, a += kTile, b += kTile) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_right) {
      _tile_loadd(7, b + next, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (two_down) {
      _tile_loadd(5, a + next, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (two_down && two_right) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  if constexpr (two_right) _tile_stored(1, out + 16, 128);
  if constexpr (two_down) _tile_stored(2, out + 512, 128);
  if constexpr (two_down && two_right) _tile_stored(3, out + 528, 128);
}

__m512 widened(__m256i half) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }

// Write a block of sums, with its bias, to where it belongs: rows x columns of it, as bf16.
void write(const float* sums, int64_t rows, int64_t columns, const Bits* bias, Bits* out, int64_t stride) {
  const __mmask32 mask = columns >= 32 ? ~0u : (1u << columns) - 1;
  const __m512i offset = bias ? _mm512_maskz_loadu_epi16(mask, bias) : _mm512_setzero_si512();
  const __m512 low = widened(_mm512_castsi512_si256(offset)), high = widened(_mm512_extracti64x4_epi64(offset, 1));
  for (int64_t r = 0; r < std::min<int64_t>(rows, 32); r++) {
    const __m512 first = _mm512_load_ps(sums + 32 * r) + low, second = _mm512_load_ps(sums + 32 * r + 16) + high;
    _mm512_mask_storeu_epi16(out + r * stride, mask, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
}

// Memory for so many numbers, kept from one product to the next.
Bits* kept(std::vector<Bits>& memory, int64_t count) {
  const size_t needed = count + kDepth;
  if (memory.size() < needed) memory.resize(needed);
  return reinterpret_cast<Bits*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

void product(const Factor& a, const Factor& b, const Bits* bias, Bits* out) {
  // Threads share the rows of the result, or its columns where that lets them read less of what another one wrote,
  // which is several times as slow as what is their own.
  const bool by_rows = b.sides * a.depths < a.sides * a.depths + a.sides * b.sides / 2;
  const Factor &own = by_rows ? a : b, &common = by_rows ? b : a;
  const int64_t deep = a.deep(), panel = deep * kTile;
  const auto pack_panel = [&](const Factor& x, int64_t i, Bits* to) {
    for (int64_t k = 0; k < deep; k++) pack(x, i, k, &x == &b, to + k * kTile);
  };
  const auto each = [&](int64_t count, const auto& work) {
    if (a.sides * b.sides * a.depths < kSerial)
      work(0, count);
    else
      torch::stable::parallel_for(0, count, 1, work);
  };

  thread_local std::vector<Bits> memory;
  Bits* shared = kept(memory, common.down() * panel);
  each(common.down(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) pack_panel(common, i, shared + i * panel);
  });
  each((own.down() + 1) / 2, [&](int64_t first, int64_t last) {
    thread_local std::vector<Bits> nearby;
    alignas(64) float sums[32 * 32];
    Bits* two = kept(nearby, 2 * panel);
    configure();
    for (int64_t i = first; i < last; i++) {
      const bool both = 2 * i + 1 < own.down();
      pack_panel(own, 2 * i, two);
      if (both) pack_panel(own, 2 * i + 1, two + panel);
      for (int64_t j = 0; j < (common.down() + 1) / 2; j++) {
        const Bits* other = shared + 2 * j * panel;
        const bool other_both = 2 * j + 1 < common.down();
        const Bits *left = by_rows ? two : other, *right = by_rows ? other : two;
        const bool two_down = by_rows ? both : other_both, two_right = by_rows ? other_both : both;
        const int64_t row = 32 * (by_rows ? i : j), column = 32 * (by_rows ? j : i);
        const auto multiplied = two_down ? (two_right ? multiply<true, true> : multiply<true, false>)
                                         : (two_right ? multiply<false, true> : multiply<false, false>);
        multiplied(left, right, deep, sums);
        write(sums, a.sides - row, b.sides - column, bias ? bias + column : nullptr, out + row * b.sides + column,
              b.sides);
      }
    }
    _tile_release();
  });
}

// --- convolutions of 3 x 3 and stride 2, padded by 1 --------------------------------------------------------------------

struct Image {
  int64_t height, width, channels;
  int64_t half_height() const { return (height + 1) / 2; }
  int64_t half_width() const { return (width + 1) / 2; }
};

// Of each place (i, j) of half the size the nine pixels around (2i, 2j), one after the other; zeros outside.
void windows(const Image& of, const Bits* image, Bits* out) {
  const int64_t channels = of.channels;
  for (int64_t i = 0; i < of.half_height(); i++)
    for (int64_t j = 0; j < of.half_width(); j++)
      for (int64_t row = 2 * i - 1; row < 2 * i + 2; row++)
        for (int64_t column = 2 * j - 1; column < 2 * j + 2; column++, out += channels) {
          const bool inside = row >= 0 && row < of.height && column >= 0 && column < of.width;
          const Bits* from = image + (row * of.width + column) * channels;
          for (int64_t c = 0; c < channels; c += 32) {
            const __mmask32 mask = channels - c >= 32 ? ~0u : (1u << (channels - c)) - 1;
            _mm512_mask_storeu_epi16(out + c, mask, _mm512_maskz_loadu_epi16(inside ? mask : 0, from + c));
          }
        }
}

// Of each pixel the sum, in fp32, of what the windows that it lies in hold for it.
void spread(const Image& of, const Bits* windows, Bits* image) {
  const int64_t channels = of.channels, width = of.half_width();
  for (int64_t row = 0; row < of.height; row++)
    for (int64_t column = 0; column < of.width; column++, image += channels) {
      // An even row is the middle of one window, an odd one the end of one and the start of the next; so are columns.
      const Bits* parts[4];
      int found = 0;
      for (int64_t i = row / 2; i <= std::min((row + 1) / 2, of.half_height() - 1); i++)
        for (int64_t j = column / 2; j <= std::min((column + 1) / 2, width - 1); j++) {
          const int64_t tap = (row - 2 * i + 1) * 3 + column - 2 * j + 1;
          parts[found++] = windows + ((i * width + j) * 9 + tap) * channels;
        }
      for (int64_t c = 0; c < channels; c += 16) {
        const __mmask16 mask = channels - c >= 16 ? 0xffff : (1u << (channels - c)) - 1;
        __m512 sum = _mm512_setzero_ps();
        for (int n = 0; n < found; n++) sum += widened(_mm256_maskz_loadu_epi16(mask, parts[n] + c));
        _mm256_mask_storeu_epi16(image + c, mask, (__m256i)_mm512_cvtneps_pbh(sum));
      }
    }
}

// --- as operations of torch ------------------------------------------------------------------------------------------

// A matrix in a layout that can be packed: one of its axes is contiguous, or has one entry.
Tensor lying(const Tensor& x) {
  const auto is_plain = [&](int64_t axis) { return x.stride(axis) == 1 || x.size(axis) == 1; };
  return is_plain(0) || is_plain(1) ? x : torch::stable::contiguous(x);
}

Factor seen(const Tensor& x, int64_t side) {
  const int64_t depth = 1 - side;
  return {static_cast<const Bits*>(x.data_ptr()), x.size(side), x.size(depth), x.stride(side),
          x.size(depth) == 1 ? 1 : x.stride(depth)};
}

Tensor run(const Tensor* bias, const Tensor& a, const Tensor& b, bool a_turned, bool b_turned) {
  const Tensor x = lying(a), y = lying(b);
  const Factor left = seen(x, a_turned), right = seen(y, !b_turned);
  Tensor out = torch::stable::new_empty(a, {left.sides, right.sides});
  const auto* added = bias ? static_cast<const Bits*>(bias->data_ptr()) : nullptr;
  product(left, right, added, static_cast<Bits*>(out.data_ptr()));
  return out;
}

Tensor tile_product(Tensor a, Tensor b, bool a_turned, bool b_turned) { return run(nullptr, a, b, a_turned, b_turned); }

Tensor tile_affine(Tensor bias, Tensor a, Tensor b, bool a_turned, bool b_turned) {
  const Tensor row = torch::stable::contiguous(bias);
  return run(&row, a, b, a_turned, b_turned);
}

// (B, H, W, C), contiguous, to (B * h * w, 9 * C).
Tensor windows_of(Tensor images) {
  const Tensor x = torch::stable::contiguous(images);
  const Image of{x.size(1), x.size(2), x.size(3)};
  const int64_t pixels = of.height * of.width, places = of.half_height() * of.half_width(), wide = 9 * of.channels;
  Tensor out = torch::stable::new_empty(x, {x.size(0) * places, wide});
  const auto* from = static_cast<const Bits*>(x.data_ptr());
  auto* to = static_cast<Bits*>(out.data_ptr());
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) windows(of, from + n * pixels * of.channels, to + n * places * wide);
  });
  return out;
}

// (B * h * w, 9 * C), contiguous, to (B, H, W, C).
Tensor spread_over(Tensor parts, int64_t height, int64_t width) {
  const Tensor x = torch::stable::contiguous(parts);
  const Image of{height, width, x.size(1) / 9};
  const int64_t pixels = height * width, places = of.half_height() * of.half_width(), count = x.size(0) / places;
  Tensor out = torch::stable::new_empty(x, {count, height, width, of.channels});
  const auto* from = static_cast<const Bits*>(x.data_ptr());
  auto* to = static_cast<Bits*>(out.data_ptr());
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) spread(of, from + n * places * x.size(1), to + n * pixels * of.channels);
  });
  return out;
}

}  // namespace

// Asks the system for the tiles' registers, which a process does not have from its start; 0 says that it has them now.
extern "C" long vaelab_permit_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18); }

STABLE_TORCH_LIBRARY_IMPL(vaelab, CPU, m) {
  m.impl("tile_product", TORCH_BOX(&tile_product));
  m.impl("tile_affine", TORCH_BOX(&tile_affine));
  m.impl("windows", TORCH_BOX(&windows_of));
  m.impl("spread", TORCH_BOX(&spread_over));
}
