// Attention of a tree step, over any cache: every query gets the bits that the chain of its ancestors would give it.
//
// The trunk, all whole chunks before the step, is the same for all queries and read once for all of them. What
// follows is read once for each path of the tree, in the order of the path (tree_path.h), and joins what the path's
// queries have of the trunk.
#pragma once
#include <vector>

#include "attention_driver.h"
#include "attention_partials.h"

namespace gw {

// Steps with more tokens than a mask has bits are no trees.
template <class T>
bool has_paths(const AttentionArgs<T>& a) {
  return a.tree && a.tokens <= TREE_TOKENS;
}

// The tokens of the step that token t of a row sees; none of them if it is padding.
template <class T>
uint64_t tree_mask(const AttentionArgs<T>& a, int64_t row, int64_t t) {
  const int64_t count = a.counts[row];
  if (t >= count) return 0;
  return uint64_t(a.tree[row * a.tokens + t]) & (count < TREE_TOKENS ? (uint64_t(1) << count) - 1 : ~uint64_t(0));
}

// A sequence as the queries of a path see it: numbers from `length` on are places on the path.
template <class T>
Sequence along(const AttentionArgs<T>& a, Sequence seq, const TreePath& path) {
  seq.path = &path;
  seq.total = seq.length + path.depth;
  seq.plain = true;
  for (int64_t d = 0; a.window && d < path.depth; ++d)
    seq.plain &= a.positions[seq.row * a.tokens + path.column[d]] == a.lengths[seq.row] + d;
  return seq;
}

// The paths of row b's tree: from each leaf up, as far as no other path has been. Padding sees nothing, which is a
// path too.
template <class T>
void add_paths(const AttentionArgs<T>& a, int64_t b, std::vector<TreePath>& paths) {
  uint64_t taken = 0;
  for (int64_t leaf = a.tokens - 1; leaf >= 0; --leaf) {
    if (taken >> leaf & 1) continue;
    const uint64_t whole = tree_mask(a, b, leaf);
    TreePath path = TreePath::of(whole);
    for (int64_t t = 0; t <= leaf; ++t) {
      const uint64_t own = tree_mask(a, b, t), before = (uint64_t(2) << t) - 1;
      if (taken >> t & 1 || (t != leaf && own != (whole & before))) continue;
      path.ask(t, own);
      taken |= uint64_t(1) << t;
    }
    paths.push_back(path);
  }
}

// The items of a tree step: those of a path together.
template <class T>
class TreeItems {
 public:
  explicit TreeItems(const AttentionArgs<T>& a) : a_(a) {
    const int64_t shared = a.heads / a.groups;
    for (int64_t b = 0; b < a.batch; ++b) {
      const size_t first = paths_.size();
      add_paths(a, b, paths_);
      for (int64_t g = 0; g < a.groups; ++g)
        for (size_t p = first; p < paths_.size(); ++p)
          for (int64_t from = 0, rows = paths_[p].queries * shared; from < rows; from += ITEM_ROWS)
            parts_.push_back({b, g, from, std::min(rows, from + ITEM_ROWS), p});
    }
  }
  int64_t count() const { return int64_t(parts_.size()); }
  template <class Cache>
  void fill(Item<T>& item, const Cache& cache, int64_t index) const {
    const Part& part = parts_[index];
    item.fill(a_, cache, along(a_, sequence_of(a_, part.row), paths_[part.path]), part.group, part.from, part.to);
  }

 private:
  struct Part {
    int64_t row, group, from, to;  // query rows [from, to) of the path and group
    size_t path;
  };

  const AttentionArgs<T>& a_;
  std::vector<TreePath> paths_;
  std::vector<Part> parts_;
};

// Where the last segment of a sequence, which has the step's tokens, stops being the same for all queries. What is
// stored otherwise lies before the step.
inline int64_t trunk_end(const Segment& last, int64_t length) { return std::max(last.lo, length / CHUNK * CHUNK); }

// What both passes leave to the cache.
template <class T, class Cache>
struct Pass {
  struct Workspace : Cache::Workspace {
    explicit Workspace(const Pass& pass) : Cache::Workspace(pass.cache) {}
  };
  const AttentionArgs<T>& a;
  const Cache& cache;
  const Partials& partials;  // of the trunk

  int query_sets() const { return cache.query_sets(); }
  int states() const { return cache.states(); }
  const T* turned(Workspace& work, int64_t group, const T* row, int i) const {
    return cache.turned(work, group, row, i);
  }
  template <class Engine>
  void stage(Engine& engine, Workspace& work, const Sequence& seq, int64_t group, const Segment& segment,
             int64_t chunk) const {
    cache.stage(engine, work, seq, group, segment, chunk);
  }
};

// A cache's tokens up to the end of the trunk; results are kept.
template <class T, class Cache>
struct Trunk : Pass<T, Cache> {
  using Workspace = typename Pass<T, Cache>::Workspace;
  int segments(const Sequence& seq, Segment* out) const {
    const int count = this->cache.segments(seq, out);
    if (count) out[count - 1].hi = std::min(out[count - 1].hi, trunk_end(out[count - 1], seq.length));
    return count;
  }
  void gather(Workspace&, int64_t, int, const Partial&, const Partial&) const {}
  void begin(const Sequence& seq, const RowTile& tile, const Partial& state) const {
    begin_tile(this->cache, seq, tile, state);
  }
  void finish(const Sequence& seq, const RowTile& tile, const Partial& state) const {
    for (int i = 0; i < tile.count; ++i)
      this->partials.keep(seq.row * this->a.tokens + tile.rows[i].token, tile.rows[i].head, state, i);
  }
};

// ... and from there on.
template <class T, class Cache>
struct Branches : Pass<T, Cache> {
  using Workspace = typename Pass<T, Cache>::Workspace;
  int segments(const Sequence& seq, Segment* out) const {
    Segment all[MAX_SEGMENTS];
    const int count = this->cache.segments(seq, all);
    if (!count) return 0;  // no tokens, not even of the step
    out[0] = all[count - 1];
    out[0].lo = trunk_end(out[0], seq.length);
    return 1;
  }
  void gather(Workspace& work, int64_t group, int rows, const Partial& plain, const Partial& pages) const {
    this->cache.gather(work, group, rows, plain, pages);
  }
  void begin(const Sequence& seq, const RowTile& tile, const Partial& state) const {
    for (int i = 0; i < tile.count; ++i)
      this->partials.give(seq.row * this->a.tokens + tile.rows[i].token, tile.rows[i].head, state, i);
  }
  void finish(const Sequence& seq, const RowTile& tile, const Partial& state) const {
    finish_tile(this->a, this->cache, seq, tile, state);
  }
};

// A step whose queries read all that they see of their sequences.
template <class T, class Cache>
void attend(const AttentionArgs<T>& a, const Cache& cache) {
  if (!has_paths(a)) return attend(a, cache, Rows<T>(a));
  static thread_local Scratch memory;
  const Partials partials(memory, a.batch * a.tokens, a.heads, round_up(a.e, 16), cache.states());
  attend(a, Trunk<T, Cache>{{a, cache, partials}}, Rows<T>(a));
  attend(a, Branches<T, Cache>{{a, cache, partials}}, TreeItems<T>(a));
}

}  // namespace gw
