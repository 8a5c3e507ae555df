// How to find the nearest second half for every first half of a lattice's points, with few comparisons.
#pragma once

#include <bitset>
#include <vector>

#include "kernels.h"

// The second halves that go with a first one are a list, and lists have much in common. As long as two share enough,
// what they share becomes a list of its own, and its minimum a term in place of its members wherever all of them occur.
class SharedMinima {
  public:
    // `partners`: for each first half the places of its second halves, of which there are `halves`.
    SharedMinima(const std::vector<std::vector<int>>& partners, int halves, LatticePoints& points)
        : points(points), halves(halves), firsts(partners.size()) {
        for (const auto& places : partners) {
            lists.emplace_back();
            for (int place : places) lists.back().set(place);
        }
        while (number(lists.size()) < MOST_TERMS && share_most()) {}
        for (size_t list = firsts; list < lists.size(); list++) write_shared(list);
        for (size_t list = 0; list < firsts; list++) write(list);
    }

  private:
    using Terms = std::bitset<MOST_TERMS>;
    static constexpr size_t ENOUGH = 4;  // members, to be worth a list

    LatticePoints& points;
    const size_t halves, firsts;
    std::vector<Terms> lists;  // those of the first halves, then the shared ones
    Terms written;
    int list_count = 0, term_count = 0;

    // What a shared list's minimum is called as a term.
    size_t number(size_t list) const { return halves + list - firsts; }

    bool share_most() {
        Terms most;
        for (size_t i = 0; i < lists.size(); i++)
            for (size_t j = 0; j < i; j++) {
                Terms common = lists[i] & lists[j];
                if (common.count() > most.count()) most = common;
            }
        if (most.count() < ENOUGH) return false;
        for (Terms& list : lists)
            if ((list & most) == most) (list &= ~most).set(number(lists.size()));
        lists.push_back(most);
        return true;
    }

    // Those that it refers to come first.
    void write_shared(size_t list) {
        if (written[number(list)]) return;
        for (size_t other = firsts; other < lists.size(); other++)
            if (lists[list][number(other)]) write_shared(other);
        written.set(number(list));
        points.shared[points.shared_count++] = number(list);
        write(list);
    }

    void write(size_t list) {
        points.term_counts[list_count++] = lists[list].count();
        for (size_t term = 0; term < MOST_TERMS; term++)
            if (lists[list][term]) points.terms[term_count++] = term;
    }
};
