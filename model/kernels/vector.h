// Registers of floats, loaded from and stored to float32 and bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, PIXELS = 8;  // floats in a register; pixels of a block of a matrix product
#else
constexpr int LANES = 8, PIXELS = 4;
#endif
constexpr int AHEAD = 4;               // pixels of a row at a time, whose filters share what they load
constexpr int TAPS = 9;                // of a 3 x 3 filter
constexpr int BLOCK = 1024;            // pixels of a share of the work, and of a sum of gradients in float32 before it goes on in double
constexpr int AHEAD_IN_MEMORY = 2048;  // numbers; what is fetched so early is there when a loop gets to it

#define UNROLL _Pragma("GCC unroll 16")

using bf16 = std::uint16_t;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float HalfVec __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));  // of half a Vec
typedef std::uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef bf16 Halves __attribute__((vector_size(2 * LANES)));

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Vec load(const bf16* from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Vec)(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline void store(bf16* to, Vec v) {  // to the nearest, ties to even; NaN stays NaN
    const Words w = (Words)v, quiet_nan = Words{} + 0x7fc0;
    const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    const Halves h = __builtin_convertvector(v == v ? rounded : quiet_nan, Halves);
    std::memcpy(to, &h, sizeof h);
}

inline void widen(Vec v, Doubles to[2]) {
    HalfVec halves[2];
    std::memcpy(halves, &v, sizeof v);
    UNROLL for (int h = 0; h < 2; h++) to[h] = __builtin_convertvector(halves[h], Doubles);
}

inline void add_to(double* sum, Doubles v) {
    Doubles old;
    std::memcpy(&old, sum, sizeof old);
    old += v;
    std::memcpy(sum, &old, sizeof old);
}

inline Vec permuted(Vec v, Words lanes) { return __builtin_shuffle(v, lanes); }

template <class From, class To>
void copy(const From* from, To* to, int count) {
    for (int i = 0; i < count; i += LANES) {
        __builtin_prefetch(from + i + AHEAD_IN_MEMORY);
        store(to + i, load(from + i));
    }
}

// Calls block(P, first) for runs of P pixels, as many of the largest as there is room for, then of half as many, down
// to one; P is a constant of the compiler's.
template <int P, class Block>
inline void in_blocks(int pixels, const Block& block, int first = 0) {
    for (; first + P <= pixels; first += P) block(std::integral_constant<int, P>{}, first);
    if constexpr (P > 1) in_blocks<P / 2>(pixels, block, first);
}

// Zeroed floats, aligned to the registers: a load across two cache lines takes twice as long.
class Buffer {
  public:
    explicit Buffer(int size = 0) : vectors_((size + LANES - 1) / LANES) {}

    float* data() { return (float*)vectors_.data(); }
    const float* data() const { return (const float*)vectors_.data(); }
    float& operator[](int i) { return data()[i]; }
    const float& operator[](int i) const { return data()[i]; }

  private:
    std::vector<Vec> vectors_;
};

// Calls work(part, first, end) for `parts` even shares of `count` items, in as many threads if OpenMP grants them. Sums
// belong to a part, not to a thread: they stay the same to the bit if it grants fewer.
template <class Work>
void in_parts(std::int64_t count, int parts, const Work& work) {
    const auto start = [=](std::int64_t part) { return (count * part + parts - 1) / parts; };
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; part++) work(part, start(part), start(part + 1));
}

}  // namespace
