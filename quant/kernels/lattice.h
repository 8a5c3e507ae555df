// The search for formats whose codes index points of a lattice, as quant/lattice_search.py explains it.
//
// A lattice is a type with SIZE, the values of a point; LEVELS, what its digits stand for; and points(), what was
// handed over. A half of a point is a number whose digits of DIGIT_BITS bits, the first in the highest place, stand
// for its levels; a pair is the number of the first half times 256 plus that of the second.
#pragma once

#include "scaled.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

constexpr int power(int base, int exponent) { return exponent ? base * power(base, exponent - 1) : 1; }

template <class Lattice> struct Halves {
    static constexpr int SIZE = Lattice::SIZE / 2, DIGIT_BITS = 8 / SIZE;
    static constexpr int LEVEL_COUNT = sizeof Lattice::LEVELS / sizeof(float);
    static constexpr int COUNT = power(LEVEL_COUNT, SIZE);

    // The number of each half, in lexical order.
    struct Numbers {
        int of[COUNT] = {};

        constexpr Numbers() {
            for (int place = 0; place < COUNT; place++)
                for (int digit = 0, rest = place; digit < SIZE; digit++, rest /= LEVEL_COUNT)
                    of[place] |= rest % LEVEL_COUNT << DIGIT_BITS * digit;
        }
    };
    static constexpr Numbers NUMBERS{};

    static Floats level(Ints pair, int i) {
        Ints digit = pair >> (DIGIT_BITS * (Lattice::SIZE - 1 - i)) & ((1 << DIGIT_BITS) - 1);
        Floats level = all(Lattice::LEVELS[0]);
        for (int other = 1; other < LEVEL_COUNT; other++) level = digit == other ? all(Lattice::LEVELS[other]) : level;
        return level;
    }

    // The pair of a point with these levels; their signs do not matter.
    static Ints pair(const Floats* levels) {
        Ints pair = all(0);
        for (int i = 0; i < Lattice::SIZE; i++) {
            Ints digit = all(0);
            for (int other = 1; other < LEVEL_COUNT; other++)
                digit = magnitude(levels[i]) >= Lattice::LEVELS[other] ? all(other) : digit;
            pair = pair << DIGIT_BITS | digit;
        }
        return pair;
    }

    // Weighted squared distances of values from all halves, in lexical order.
    template <bool WEIGHTED> static void distances(const Floats* values, Weights<WEIGHTED> weights, Floats* result) {
        constexpr int COUNT_2 = LEVEL_COUNT * LEVEL_COUNT;
        Floats single[SIZE][LEVEL_COUNT];
        for (int i = 0; i < SIZE; i++)
            for (int digit = 0; digit < LEVEL_COUNT; digit++) {
                Floats miss = values[i] - Lattice::LEVELS[digit];
                single[i][digit] = weights.times(i, miss) * miss;
            }
        if constexpr (SIZE == 2) {
            sums<LEVEL_COUNT>(single[0], single[1], result);
        } else {
            Floats left[COUNT_2], right[COUNT_2];
            sums<LEVEL_COUNT>(single[0], single[1], left);
            sums<LEVEL_COUNT>(single[2], single[3], right);
            sums<COUNT_2>(left, right, result);
        }
    }

  private:
    template <int EACH> static void sums(const Floats* left, const Floats* right, Floats* result) {
        for (int i = 0; i < EACH; i++)
            for (int j = 0; j < EACH; j++) result[EACH * i + j] = left[i] + right[j];
    }
};

// The pairs whose points are nearest to values, several points at a time: one search for the least serves all.
template <class Lattice, int POINTS, bool WEIGHTED>
void nearest_points(const Floats* values, Weights<WEIGHTED> weights, Ints* pairs) {
    using Half = Halves<Lattice>;
    const LatticePoints& points = Lattice::points();
    constexpr auto& numbers = Half::NUMBERS.of;
    Floats firsts[POINTS][Half::COUNT];
    Ints seconds[MOST_TERMS][POINTS];  // distances, not negative, sort as whole numbers do
    for (int point = 0; point < POINTS; point++) {
        int first = point * Lattice::SIZE, second = first + Half::SIZE;
        Floats distances[Half::COUNT];
        Half::distances(values + first, weights.from(first), firsts[point]);
        Half::distances(values + second, weights.from(second), distances);
        for (int place = 0; place < Half::COUNT; place++)
            seconds[place][point] = (bits(distances[place]) & ~255) | numbers[place];
    }
    const uint8_t *term = points.terms, *count = points.term_counts;
    auto least_of_list = [&](Ints (&least)[POINTS]) {
        const uint8_t* end = term + *count++;
        for (int point = 0; point < POINTS; point++) least[point] = seconds[*term][point];
        while (++term != end)
            for (int point = 0; point < POINTS; point++) least[point] = smaller(least[point], seconds[*term][point]);
    };
    for (int list = 0; list < points.shared_count; list++) {
        Ints least[POINTS];
        least_of_list(least);
        for (int point = 0; point < POINTS; point++) seconds[points.shared[list]][point] = least[point];
    }
    Floats least[POINTS];
    Ints chosen_first[POINTS] = {}, chosen_second[POINTS] = {};
    for (Floats& distance : least) distance = from_bits(all(0x7f800000));
    for (int place = 0; place < Half::COUNT; place++) {
        if (!*count) {
            count++;
            continue;
        }
        Ints second[POINTS];
        least_of_list(second);
        for (int point = 0; point < POINTS; point++) {
            Floats distance = firsts[point][place] + from_bits(second[point]);
            Ints nearer = distance < least[point];
            least[point] = nearer ? distance : least[point];
            chosen_second[point] = nearer ? second[point] : chosen_second[point];
            chosen_first[point] = nearer ? all(numbers[place]) : chosen_first[point];
        }
    }
    for (int point = 0; point < POINTS; point++) pairs[point] = chosen_first[point] << 8 | (chosen_second[point] & 255);
}

// Sub-blocks of SIZE values whose scales are odd multiples, up to LARGEST, of a float16 step.
//
// Format is a type with COUNT, how many sub-blocks; SUB_BLOCK, their SIZE; POINTS, how many they have; Points, their
// lattice; SHIFTS, by which its levels may be moved; SPANNED, whether points are chosen before there is a step, and if
// so SPANS, the scales to choose them for, relative to the best for values by themselves; LARGEST; and choose(scaled
// values, weights, levels, codes), which fills in SIZE levels and POINTS codes.
template <class Format, bool WEIGHTED> struct LatticeBlock {
    static constexpr int COUNT = Format::COUNT, SIZE = Format::SUB_BLOCK;

    Ints step;  // bits of float16
    Ints multiples[COUNT];  // halved
    Ints codes[COUNT * Format::POINTS];
    Floats product;  // weighted sum of values times what is stored for them, in steps

    LatticeBlock(const Floats* values, Weights<WEIGHTED> weights, Floats unit) {
        ScaledFit fits[COUNT];
        Floats scale[COUNT];
        for (int i = 0; i < COUNT; i++) {
            fits[i] = best_start(values + SIZE * i, weights.from(SIZE * i));
            scale[i] = fits[i].scale();
        }
        Floats multiple[COUNT] = {}, best_step = first_step(fits, scale, multiple), stored = half(best_step, unit);
        for (int i = 0; i < COUNT; i++) {
            fits[i] = fit(values + SIZE * i, weights.from(SIZE * i), stored * multiple[i], codes + Format::POINTS * i);
            scale[i] = fits[i].scale();
            multiple[i] = nearest_odd(scale[i], reciprocal(best_step));
        }
        best_step = joint(fits, multiple).scale();
        step = half_of(best_step, unit);
        Floats inverse = reciprocal(half(best_step, unit));
        for (int i = 0; i < COUNT; i++) {
            multiple[i] = nearest_odd(scale[i], inverse);
            multiples[i] = truncated(multiple[i]) >> 1;
        }
        product = joint(fits, multiple).product;
    }

  private:
    static ScaledFit fit_of(const Floats* values, Weights<WEIGHTED> weights, const Floats* levels) {
        return ordered_sum<SIZE>([&](int i) {
            Floats weighted = weights.times(i, levels[i]);
            return ScaledFit{weighted * levels[i], weighted * values[i]};
        });
    }

    static ScaledFit fit(const Floats* values, Weights<WEIGHTED> weights, Floats scale, Ints* codes) {
        Floats inverse = reciprocal(scale), scaled[SIZE], levels[SIZE];
        for (int i = 0; i < SIZE; i++) scaled[i] = values[i] * inverse;
        Format::choose(scaled, weights, levels, codes);
        return fit_of(values, weights, levels);
    }

    // The best when each value goes to the nearest level by itself.
    static ScaledFit start(const Floats* values, Weights<WEIGHTED> weights) {
        constexpr auto& choices = Format::Points::LEVELS;
        constexpr int last = sizeof choices / sizeof choices[0] - 1;
        constexpr double peaks[] = {0.9, 1.1, 1.35, 1.7, 2.2};  // where to put the peak, relative to the highest level
        Floats peak = all(0.0f);
        ScaledFit best{};
        for (int i = 0; i < SIZE; i++) peak = larger(peak, magnitude(values[i]));
        Best gains;
        for (double relative : peaks)
            for (float shift : Format::SHIFTS) {
                Floats inverse = reciprocal(peak * float(1 / (relative * (choices[last] + shift)))), levels[SIZE];
                for (int i = 0; i < SIZE; i++) {
                    Floats scaled = values[i] * inverse;
                    levels[i] = all(choices[0] + shift);
                    for (int j = 0; j < last; j++) {
                        float middle = (choices[j + 1] + shift + (choices[j] + shift)) * 0.5f;
                        levels[i] = scaled > middle ? all(choices[j + 1] + shift) : levels[i];
                    }
                }
                ScaledFit trial = fit_of(values, weights, levels);
                Ints better = gains.improved_by(trial.gain());
                best.square = better ? trial.square : best.square;
                best.product = better ? trial.product : best.product;
            }
        return best;
    }

    static ScaledFit best_start(const Floats* values, Weights<WEIGHTED> weights) {
        ScaledFit first = start(values, weights);
        if constexpr (!Format::SPANNED) {
            return first;
        } else {
            Floats scale = first.scale();
            ScaledFit best{};
            Best gains;
            for (float span : Format::SPANS) {
                Ints codes[Format::POINTS];
                ScaledFit trial = fit(values, weights, scale * span, codes);
                Ints better = gains.improved_by(trial.gain());
                best.square = better ? trial.square : best.square;
                best.product = better ? trial.product : best.product;
            }
            return best;
        }
    }

    // The step that suits the scales best, and the multiples that go with it.
    static Floats first_step(const ScaledFit* fits, const Floats* scale, Floats* multiple) {
        constexpr double steps[] = {1.0, 1.03, 0.97, 0.94, 0.9};  // relative to the one that just spans the scales
        Floats widest = scale[0], best_step = all(0.0f);
        for (int i = 1; i < COUNT; i++) widest = larger(widest, scale[i]);
        Best gains;
        for (double relative : steps) {
            Floats trial[COUNT], inverse = reciprocal(widest * float(1 / (relative * Format::LARGEST)));
            for (int i = 0; i < COUNT; i++) trial[i] = nearest_odd(scale[i], inverse);
            ScaledFit fit = joint(fits, trial);
            Ints better = gains.improved_by(fit.gain());
            best_step = better ? fit.scale() : best_step;
            for (int i = 0; i < COUNT; i++) multiple[i] = better ? trial[i] : multiple[i];
        }
        return best_step;
    }

    static ScaledFit joint(const ScaledFit* fits, const Floats* multiple) {
        return ordered_sum<COUNT>([&](int i) {
            return ScaledFit{fits[i].square * multiple[i] * multiple[i], fits[i].product * multiple[i]};
        });
    }

    static Floats nearest_odd(Floats scale, Floats inverse_step) {
        Floats ratio = (scale * inverse_step - 1.0f) * 0.5f;
        return rounded(clamp(ratio, 0.0f, Format::LARGEST / 2)) * 2.0f + 1.0f;
    }
};

}  // namespace
