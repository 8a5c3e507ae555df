// The search for formats that store scale * level, as quant/scaled.py explains it.
//
// Levels are a type with nearest(values), the level nearest to each value as float32; PEAKS, where the value of
// largest magnitude may go, in levels; and QUICK, whether super-blocks keep the first step that is tried, unrefined.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Whole-number levels; codes count from 0.
template <int LOWEST, int HIGHEST> struct Uniform {
    static constexpr float PEAKS[] = {LOWEST, LOWEST - 1.0f, LOWEST + 1.0f, LOWEST + 2.0f};
    static constexpr bool QUICK = false;

    static Floats nearest(Floats values) { return rounded(clamp(values, LOWEST, HIGHEST)); }
    static Ints code(Floats values) { return code_of(nearest(values)); }
    static Ints code_of(Floats level) { return truncated(level) - LOWEST; }
};

// Weighted sums of level² and level * value: all that the best scale for given levels depends on.
struct ScaledFit {
    Floats square, product;

    ScaledFit operator+(const ScaledFit& other) const { return {square + other.square, product + other.product}; }
    Floats scale() const { return product * reciprocal(square); }
    // What the best scale takes off the weighted sum of squares.
    Floats gain() const { return product * scale(); }
};

inline Floats peak_of(const Floats* values, int count) {
    Floats lowest = values[0], highest = values[0];
    for (int i = 1; i < count; i++) {
        lowest = smaller(lowest, values[i]);
        highest = larger(highest, values[i]);
    }
    return highest >= -lowest ? highest : lowest;
}

template <class Levels, int COUNT, bool WEIGHTED> struct ScaledBlock {
    const Floats* values;
    Weights<WEIGHTED> weights;

    ScaledFit fit(Floats inverse) const {
        return ordered_sum<COUNT>([&](int i) {
            Floats nearest = Levels::nearest(values[i] * inverse), weighted = weights.times(i, nearest);
            return ScaledFit{weighted * nearest, weighted * values[i]};
        });
    }

    ScaledFit best_start() const {
        Floats inverse_peak = reciprocal(peak_of(values, COUNT));
        ScaledFit best{};
        Best gains;
        for (float peak : Levels::PEAKS) {
            ScaledFit trial = fit(inverse_peak * peak);
            Ints better = gains.improved_by(trial.gain());
            best.square = better ? trial.square : best.square;
            best.product = better ? trial.product : best.product;
        }
        return best;
    }
};

// The float16 scale of a block without sub-blocks, as bits.
template <class Levels, int COUNT, bool WEIGHTED>
Ints search_scale(const Floats* values, Weights<WEIGHTED> weights, Floats unit) {
    ScaledBlock<Levels, COUNT, WEIGHTED> block{values, weights};
    ScaledFit fit = block.best_start();
    for (int round = 0; round < REFINEMENTS; round++) fit = block.fit(reciprocal(half(fit.scale(), unit)));
    return half_of(fit.scale(), unit);
}

// COUNT sub-blocks of SIZE values whose scales are whole multiples, from LOWEST to HIGHEST, of a float16 step.
template <class Levels, int COUNT, int SIZE, int LOWEST, int HIGHEST, bool WEIGHTED> struct ScaledSuperBlock {
    using Block = ScaledBlock<Levels, SIZE, WEIGHTED>;

    Block blocks[COUNT];
    ScaledFit fits[COUNT];
    Floats scale[COUNT];

    struct Multiples {
        Floats step;
        Floats scales[COUNT];
    };

    ScaledSuperBlock(const Floats* values, Weights<WEIGHTED> weights) {
        for (int i = 0; i < COUNT; i++) {
            blocks[i] = {values + i * SIZE, weights.from(i * SIZE)};
            fits[i] = blocks[i].best_start();
            scale[i] = fits[i].scale();
        }
    }

    // The step comes divided by the unit; its bits are `half_of` it.
    Multiples search(Floats unit) {
        Multiples found = best_step();
        for (int round = 0; round < (Levels::QUICK ? 0 : REFINEMENTS); round++) {
            found.step = half(found.step, unit);
            for (int i = 0; i < COUNT; i++) {
                fits[i] = blocks[i].fit(reciprocal(found.step * found.scales[i]));
                scale[i] = fits[i].scale();
            }
            nearest_multiples(found);
            found.step = joint(found).scale();
        }
        return found;
    }

  private:
    Multiples best_step() const {
        // What the peak of the scales becomes, in steps.
        constexpr double targets[] = {LOWEST * 1.0, LOWEST * 1.02, LOWEST * 0.98, HIGHEST};
        Floats peak = peak_of(scale, COUNT);
        Multiples best;
        Best gains;
        for (double target : targets) {
            Multiples trial;
            trial.step = peak * float(1 / target);
            nearest_multiples(trial);
            ScaledFit fit = joint(trial);
            Ints better = gains.improved_by(fit.gain());
            best.step = better ? fit.scale() : best.step;
            for (int i = 0; i < COUNT; i++) best.scales[i] = better ? trial.scales[i] : best.scales[i];
            if (Levels::QUICK) break;
        }
        return best;
    }

    // The fit of the step, given the multiples.
    ScaledFit joint(const Multiples& multiples) const {
        return ordered_sum<COUNT>([&](int i) {
            Floats multiple = multiples.scales[i];
            return ScaledFit{fits[i].square * multiple * multiple, fits[i].product * multiple};
        });
    }

    // 0 for a scale of 0 alone: a sub-block far smaller than its neighbours is better off with few levels than none.
    void nearest_multiples(Multiples& multiples) const {
        Floats inverse = reciprocal(multiples.step);
        for (int i = 0; i < COUNT; i++) {
            Floats ratio = scale[i] * inverse, multiple = rounded(clamp(ratio, LOWEST, HIGHEST));
            multiples.scales[i] = multiple == 0.0f ? sign(ratio) : multiple;
        }
    }
};

}  // namespace
