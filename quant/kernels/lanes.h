// The arithmetic that every kernel is written in, as quant/lanes.py defines it to the last bit: one block to a lane,
// float32, no fused multiply-add (the build forbids it), rounding half to even, sums in one order.
//
// This header is compiled once for each instruction set, in a namespace of its own, so that the linker never takes
// code for a newer processor in place of code for an older one. For the same reason kernels use no standard templates.
#pragma once

#define KERNELS_JOIN(prefix, name) prefix##name
#define KERNELS_NAMESPACE(name) KERNELS_JOIN(kernels_, name)

#if defined(ONE_LANE)
#include "one_lane.h"
#else
#include "vectors.h"
#endif

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

constexpr float TINY = 0x1p-116f;  // smaller numbers count as zero, so that no reciprocal overflows
constexpr int REFINEMENTS = 1;     // rounds in which stored scales and codes adapt to each other

inline Floats clamp(Floats value, float low, float high) { return smaller(larger(value, all(low)), all(high)); }
inline Floats magnitude(Floats value) { return from_bits(bits(value) & 0x7fffffff); }

// The nearest whole number, a tie going to the even one, of a value between -2^22 and 2^22.
inline Floats rounded(Floats value) {
    constexpr float whole = 0x1.8p23f;  // at this size floats are whole numbers
    return (value + whole) - whole;
}

inline Floats sign(Floats value) {
    return value > 0.0f ? all(1.0f) : value < 0.0f ? all(-1.0f) : all(0.0f);
}

// 1 / value, and 0 where the value is too small for it.
inline Floats reciprocal(Floats value) {
    Ints usable = magnitude(value) > TINY;
    return usable ? 1.0f / (usable ? value : all(1.0f)) : all(0.0f);
}

// Finds the trial with the largest gain, lane by lane; the first of equals, and the first if its gain is not a number.
struct Best {
    Floats gain{};
    bool empty = true;

    // In which lanes a new trial is the best so far.
    Ints improved_by(Floats next) {
        Ints better = empty ? all(-1) : next > gain;
        gain = better ? next : gain;
        empty = false;
        return better;
    }
};

// Sum of term(0) ... term(COUNT - 1): each run of eight pairwise, then the runs one after another.
template <int COUNT, class Term> inline auto ordered_sum(Term term) {
    static_assert(COUNT % 8 == 0);
    auto run = [&](int i) {
        return ((term(i) + term(i + 1)) + (term(i + 2) + term(i + 3))) +
               ((term(i + 4) + term(i + 5)) + (term(i + 6) + term(i + 7)));
    };
    auto total = run(0);
    for (int i = 8; i < COUNT; i += 8) total = total + run(i);
    return total;
}

// A power of two near the largest magnitude, given as bits; divided by it any block lies within (-4, 4).
inline Floats unit_of(Ints largest) {
    return clamp(from_bits(largest & 0x7f800000), 0x1p-126f, 0x1p126f);
}

// The bits of the nearest float16 to a magnitude of at most 65504.
inline Ints half_bits(Floats positive) {
    Ints number = bits(positive);
    Ints normal = (number + 0xfff + (number >> 13 & 1) - (112 << 23)) >> 13;
    Ints subnormal = bits(positive + 0.5f) - 0x3f000000;  // at 0.5 floats are multiples of 2^-24
    return positive < 0x1p-14f ? subnormal : normal;
}

// float16 to float32, infinity and NaN included.
inline Floats float_from_half(Ints half) {
    Floats positive = from_bits((half & 0x7fff) << 13) * 0x1p112f;
    Ints number = bits(positive) | (positive >= 65536.0f ? all(0x7f800000) : all(0));
    return from_bits(number | (half & 0x8000) << 16);
}

// The nearest float16 to value * unit, as bits. Magnitudes beyond float16 become its largest, and those below its
// smallest: a scale of 0 would lose the block. Zero stays zero.
inline Ints half_of(Floats value, Floats unit) {
    Ints number = half_bits(clamp(magnitude(value * unit), 0x1p-24f, 65504.0f));
    return value == 0.0f ? all(0) : (number | (bits(value) >> 16 & 0x8000));
}

// What a float16 stands for, divided by the unit.
inline Floats stored(Ints half, Floats unit) { return float_from_half(half) * (1.0f / unit); }

// Rounds to what float16 can store.
inline Floats half(Floats value, Floats unit) { return stored(half_of(value, unit), unit); }

}  // namespace
