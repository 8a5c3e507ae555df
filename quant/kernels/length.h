// Gives blocks back the length that least squares takes from them, as quant/shrinkage.py explains it.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// What to multiply the steps of blocks of COUNT sub-blocks of SIZE values with, given the weighted sum of value times
// stored value.
template <int COUNT, int SIZE, bool WEIGHTED>
Floats lengthening(const Floats* values, Weights<WEIGHTED> weights, Floats kept) {
    constexpr float largest = 1.5f, share = 0.7f;
    Floats factor = reciprocal(kept) * ordered_sum<COUNT>([&](int i) {
        return ordered_sum<SIZE>([&](int j) {
            Floats value = values[SIZE * i + j];
            return weights.times(SIZE * i + j, value) * value;
        });
    });
    return ((factor > 1.0f) & (factor <= largest)) ? 1.0f + share * (factor - 1.0f) : all(1.0f);
}

}  // namespace
