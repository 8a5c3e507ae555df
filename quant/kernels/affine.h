// The search for formats that store scale * code - minimum, as quant/affine.py explains it.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Weighted sums over products of codes a, offsets b and values x: all that the best scale and minimum depend on.
struct AffineFit {
    Floats aa, ab, bb, ax, bx;

    // What scale and minimum take off the weighted sum of squares.
    Floats gain(Floats scale, Floats minimum) const {
        Floats linear = scale * ax - minimum * bx;
        Floats square = scale * scale * aa - 2.0f * (scale * minimum * ab) + minimum * minimum * bb;
        return 2.0f * linear - square;
    }

    // Least squares; where it has no solution the arguments stay. The minimum is at least 0 unless SIGNED.
    template <bool SIGNED> void solve(Floats& scale, Floats& minimum) const {
        constexpr float singular = 1e-6f;  // a determinant this small, relative to its terms, has lost its digits
        Floats both = aa * bb;
        Floats determinant = both - ab * ab;
        Ints regular = determinant > singular * both;
        Floats inverse = reciprocal(determinant);
        Floats new_scale = (ax * bb - ab * bx) * inverse;
        Floats new_minimum = (ab * ax - aa * bx) * inverse;
        if constexpr (!SIGNED) {
            Ints below = new_minimum < 0.0f;
            new_scale = below ? ax * reciprocal(aa) : new_scale;
            new_minimum = below ? all(0.0f) : new_minimum;
        }
        scale = regular ? new_scale : scale;
        minimum = regular ? new_minimum : minimum;
    }
};

// Ranges to try: by how many levels the lowest and the highest value lie outside the codes.
template <int TOP> struct Ranges {
    static constexpr int COUNT = 12;
    float per_range[COUNT] = {};  // the scale, relative to highest - lowest
    float below[COUNT] = {};      // the minimum, relative to the scale

    constexpr Ranges() {
        constexpr double outside[COUNT][2] = {
            {0.3, 0.3},  {0.6, 0.0}, {0.0, 0.6},   {-0.9, 0.0}, {0.0, 0.0}, {-0.9, -0.9},
            {-0.2, 0.9}, {1.3, 0.3}, {-0.2, -0.9}, {0.3, 0.0},  {0.0, 0.3}, {0.6, 0.9},
        };
        for (int i = 0; i < COUNT; i++) {
            per_range[i] = float(1 / (TOP + outside[i][0] + outside[i][1]));
            below[i] = float(outside[i][0]);
        }
    }
};

// COUNT values, to be stored with codes from 0 to TOP.
template <int COUNT, int TOP, bool SIGNED, bool WEIGHTED> struct AffineBlock {
    static constexpr int SIZE = COUNT;
    static constexpr bool IS_SIGNED = SIGNED;
    static constexpr Ranges<TOP> STARTS{};  // not in a function, where NVRTC leaves it all zeros

    const Floats* values;
    Weights<WEIGHTED> weights;
    Floats weight_sum, value_sum;

    AffineBlock() = default;

    AffineBlock(const Floats* values, Weights<WEIGHTED> weights) : values(values), weights(weights) {
        weight_sum = ordered_sum<COUNT>([&](int i) { return weights.times(i, all(1.0f)); });
        value_sum = ordered_sum<COUNT>([&](int i) { return weights.times(i, values[i]); });
    }

    // The nearest code to a value.
    Floats code(int i, Floats minimum, Floats inverse_scale) const {
        return rounded(clamp((values[i] + minimum) * inverse_scale, 0.0f, TOP));
    }

    AffineFit fit(Floats scale, Floats minimum) const {
        struct Sums {
            Floats aa, ab, ax;
            Sums operator+(const Sums& other) const { return {aa + other.aa, ab + other.ab, ax + other.ax}; }
        };
        Floats inverse = reciprocal(scale);
        Sums sums = ordered_sum<COUNT>([&](int i) {
            Floats nearest = code(i, minimum, inverse), weighted = weights.times(i, nearest);
            return Sums{weighted * nearest, weighted, weighted * values[i]};
        });
        return {sums.aa, sums.ab, weight_sum, sums.ax, value_sum};
    }

    // The sums, scale and minimum that the best of the ranges leads to.
    AffineFit best_start(Floats& scale, Floats& minimum) const {
        Floats lowest = values[0], highest = values[0];
        for (int i = 1; i < COUNT; i++) {
            lowest = smaller(lowest, values[i]);
            highest = larger(highest, values[i]);
        }
        if (!SIGNED) lowest = smaller(lowest, all(0.0f));
        scale = minimum = all(0.0f);
        AffineFit best{};
        Best gains;
        for (int i = 0; i < STARTS.COUNT; i++) {
            Floats new_scale = (highest - lowest) * STARTS.per_range[i];
            Floats new_minimum = -lowest - new_scale * STARTS.below[i];
            if (!SIGNED) new_minimum = larger(new_minimum, all(0.0f));
            AffineFit trial = fit(new_scale, new_minimum);
            trial.template solve<SIGNED>(new_scale, new_minimum);
            Ints better = gains.improved_by(trial.gain(new_scale, new_minimum));
            scale = better ? new_scale : scale;
            minimum = better ? new_minimum : minimum;
            best.aa = better ? trial.aa : best.aa;
            best.ab = better ? trial.ab : best.ab;
            best.ax = better ? trial.ax : best.ax;
        }
        best.bb = weight_sum;
        best.bx = value_sum;
        return best;
    }
};

// The float16 scale and minimum of a block without sub-blocks, as bits.
template <class Block> void search_scale_and_minimum(const Block& block, Floats unit, Ints& scale, Ints& minimum) {
    Floats new_scale, new_minimum;
    block.best_start(new_scale, new_minimum);
    for (int round = 0; round < REFINEMENTS; round++) {
        new_scale = half(new_scale, unit);
        new_minimum = half(new_minimum, unit);
        block.fit(new_scale, new_minimum).template solve<Block::IS_SIGNED>(new_scale, new_minimum);
    }
    scale = half_of(new_scale, unit);
    minimum = half_of(new_minimum, unit);
}

// COUNT sub-blocks whose scales and minima are whole multiples, up to LARGEST, of two float16 steps.
template <class Block, int COUNT, int LARGEST> struct AffineSuperBlock {
    Block blocks[COUNT];
    AffineFit fits[COUNT];
    Floats scale[COUNT], minimum[COUNT];

    struct Multiples {
        Floats scale_step, minimum_step;
        Floats scales[COUNT], minima[COUNT];
    };

    template <bool WEIGHTED> AffineSuperBlock(const Floats* values, Weights<WEIGHTED> weights) {
        for (int i = 0; i < COUNT; i++) {
            blocks[i] = Block(values + i * Block::SIZE, weights.from(i * Block::SIZE));
            fits[i] = blocks[i].best_start(scale[i], minimum[i]);
        }
    }

    // The steps come divided by the unit; their bits are `half_of` them.
    Multiples search(Floats unit) {
        Multiples found = best_steps();
        for (int round = 0; round < REFINEMENTS; round++) {
            found.scale_step = half(found.scale_step, unit);
            found.minimum_step = half(found.minimum_step, unit);
            for (int i = 0; i < COUNT; i++) {
                scale[i] = found.scale_step * found.scales[i];
                minimum[i] = found.minimum_step * found.minima[i];
                fits[i] = blocks[i].fit(scale[i], minimum[i]);
                fits[i].template solve<false>(scale[i], minimum[i]);
            }
            nearest_multiples(found);
            joint(found).template solve<false>(found.scale_step, found.minimum_step);
        }
        return found;
    }

  private:
    Multiples best_steps() const {
        Floats widest = scale[0], deepest = minimum[0];
        for (int i = 1; i < COUNT; i++) {
            widest = larger(widest, scale[i]);
            deepest = larger(deepest, minimum[i]);
        }
        // Relative to the steps that just span scales and minima.
        constexpr double steps[][2] = {{1.0, 1.0}, {1.05, 1.0}, {1.0, 1.05}};
        Multiples best;
        Best gains;
        for (auto& step : steps) {
            Multiples trial;
            trial.scale_step = widest * float(step[0] / LARGEST);
            trial.minimum_step = deepest * float(step[1] / LARGEST);
            nearest_multiples(trial);
            AffineFit fit = joint(trial);
            fit.template solve<false>(trial.scale_step, trial.minimum_step);
            Ints better = gains.improved_by(fit.gain(trial.scale_step, trial.minimum_step));
            best.scale_step = better ? trial.scale_step : best.scale_step;
            best.minimum_step = better ? trial.minimum_step : best.minimum_step;
            for (int i = 0; i < COUNT; i++) {
                best.scales[i] = better ? trial.scales[i] : best.scales[i];
                best.minima[i] = better ? trial.minima[i] : best.minima[i];
            }
        }
        return best;
    }

    // The fit of the two steps, given the multiples.
    AffineFit joint(const Multiples& multiples) const {
        auto sum = [&](auto term) { return ordered_sum<COUNT>(term); };
        const Floats *s = multiples.scales, *m = multiples.minima;
        return {
            sum([&](int i) { return fits[i].aa * s[i] * s[i]; }),
            sum([&](int i) { return fits[i].ab * s[i] * m[i]; }),
            sum([&](int i) { return fits[i].bb * m[i] * m[i]; }),
            sum([&](int i) { return fits[i].ax * s[i]; }),
            sum([&](int i) { return fits[i].bx * m[i]; }),
        };
    }

    // For each sub-block the scale rounded down or up, with the minimum that suits it best. A scale is never 0: a
    // sub-block far narrower than its neighbours is better off with few codes than with one.
    void nearest_multiples(Multiples& multiples) const {
        Floats inverse_scale = reciprocal(multiples.scale_step), inverse_minimum = reciprocal(multiples.minimum_step);
        for (int i = 0; i < COUNT; i++) {
            Floats below = to_float(truncated(clamp(scale[i] * inverse_scale, 0.0f, LARGEST)));
            Best gains;
            for (int up = 0; up < 2; up++) {
                Floats multiple = clamp(below + float(up), 1.0f, LARGEST);
                Floats stored = multiple * multiples.scale_step;
                Floats best_minimum = (fits[i].ab * stored - fits[i].bx) * reciprocal(fits[i].bb);
                Floats minima = rounded(clamp(best_minimum * inverse_minimum, 0.0f, LARGEST));
                Ints better = gains.improved_by(fits[i].gain(stored, minima * multiples.minimum_step));
                multiples.scales[i] = better ? multiple : multiples.scales[i];
                multiples.minima[i] = better ? minima : multiples.minima[i];
            }
        }
    }
};

}  // namespace
