// Gives blocks back the length that least squares takes from them, as quant/shrinkage.py explains it.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// What to multiply the steps of blocks of SIZE values with, given the weighted sum of value times stored value.
template <int SIZE, bool WEIGHTED>
Floats lengthening(const Floats* values, Weights<WEIGHTED> weights, Floats kept) {
    constexpr float largest = 1.5f, share = 0.7f;
    Floats whole = ordered_sum<SIZE>([&](int i) { return weights.times(i, values[i]) * values[i]; });
    Floats factor = whole * reciprocal(kept);
    return ((factor > 1.0f) & (factor <= largest)) ? 1.0f + share * (factor - 1.0f) : all(1.0f);
}

}  // namespace
