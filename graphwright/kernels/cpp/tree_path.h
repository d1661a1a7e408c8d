// The queries of a tree step that lie on one path from the root, and the tokens of that path.
//
// A query sees its path as it would see a chain: its ancestor at depth d has the place `length + d`, wherever siblings
// have put it in the step. So its chunks, the lanes of its sums and its pairs of keys are those of the chain, and its
// bits too.
#pragma once
#include <cstdint>

namespace gw {

constexpr int64_t TREE_TOKENS = 64;  // of a step at most: the bits of a mask

struct TreePath {
  int64_t depth = 0;            // tokens of the path
  uint8_t column[TREE_TOKENS];  // which tokens of the step they are
  int64_t queries = 0;
  uint8_t query[TREE_TOKENS];   // the step's tokens that ask, in order
  uint8_t seen[TREE_TOKENS];    // how many tokens of the path each of them sees

  // Adds a query that sees the path's first tokens, given as a mask.
  void ask(int64_t token, uint64_t mask) {
    query[queries] = uint8_t(token);
    seen[queries++] = uint8_t(__builtin_popcountll(mask));
  }
  // The path that a mask names, without queries.
  static TreePath of(uint64_t mask) {
    TreePath path;
    for (; mask; mask &= mask - 1) path.column[path.depth++] = uint8_t(__builtin_ctzll(mask));
    return path;
  }
};

}  // namespace gw
