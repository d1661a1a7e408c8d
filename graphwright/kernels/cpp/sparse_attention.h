// The items of a step whose queries read lists of pages, for any cache.
//
// Each query has a list of its own and is an item of its own, all heads of the group. Queries of a sequence that
// follow each other and read the same are items together, in a tree those of a path; those that read everything have
// no order.
#pragma once
#include <vector>

#include "attention_tree.h"

namespace gw {

template <class T>
class ListedItems {
 public:
  ListedItems(const AttentionArgs<T>& a, const PageLists& lists) : a_(a), lists_(lists) {
    const bool tree = has_paths(a);
    for (int64_t b = 0; b < a.batch; ++b) {
      std::vector<TreePath> paths;
      if (tree) add_paths(a, b, paths);
      for (int64_t g = 0; g < a.groups; ++g) {
        if (!tree) add(b, g, nullptr);
        for (const TreePath& path : paths) add(b, g, &path);
      }
      paths_.push_back(std::move(paths));  // its elements stay where they are
    }
  }
  // Does any query read a list?
  bool any() const { return any_; }
  int64_t count() const { return int64_t(parts_.size()); }
  template <class Cache>
  void fill(Item<T>& item, const Cache& cache, int64_t index) const {
    const Part& part = parts_[index];
    Sequence seq = sequence_of(a_, part.row);
    if (part.listed) {
      const TokenOrder& o = part.order;
      seq = {part.row, o.place(o.length), o.place(o.total), o.shift(), seq.plain, &o};
    }
    if (part.path) seq = along(a_, seq, *part.path);
    item.fill(a_, cache, seq, part.group, part.from, part.to);
  }

 private:
  struct Part {
    int64_t row, group, from, to;  // query rows [from, to) of the sequence (or path) and group
    const TreePath* path;
    bool listed;
    TokenOrder order;
  };
  // The queries of a row, or of one path of its tree.
  void add(int64_t b, int64_t g, const TreePath* path) {
    const int64_t shared = a_.heads / a_.groups, queries = path ? path->queries : a_.tokens;
    const auto token = [=](int64_t i) { return path ? int64_t(path->query[i]) : i; };
    for (int64_t i = 0, next; i < queries; i = next) {
      const int64_t t = token(i);
      for (next = i + 1; next < queries && same(b, g, t, token(next));) ++next;
      Part part{b, g, 0, 0, path, !everything(b, g, t), {}};
      if (part.listed) {
        part.order = TokenOrder::of(pages(b, g, t), lists_.chosen[query(b, g, t)], lists_.page, lists_.first,
                                    a_.lengths[b], a_.lengths[b] + a_.counts[b]);
        part.order.path = path;
      }
      for (int64_t from = i * shared; from < next * shared; from += ITEM_ROWS) {
        part.from = from, part.to = std::min(next * shared, from + ITEM_ROWS);
        parts_.push_back(part);
      }
      any_ |= part.listed;
    }
  }
  int64_t query(int64_t b, int64_t g, int64_t t) const { return (b * a_.tokens + t) * a_.groups + g; }
  const int32_t* pages(int64_t b, int64_t g, int64_t t) const {
    return lists_.pages + query(b, g, t) * lists_.capacity;
  }
  // Padding reads nothing, however it is told to.
  bool everything(int64_t b, int64_t g, int64_t t) const {
    return t >= a_.counts[b] || lists_.chosen[query(b, g, t)] < 0;
  }
  // Do two tokens read the same?
  bool same(int64_t b, int64_t g, int64_t one, int64_t other) const {
    if (everything(b, g, one) || everything(b, g, other)) return everything(b, g, one) && everything(b, g, other);
    const int64_t count = lists_.chosen[query(b, g, one)];
    return count == lists_.chosen[query(b, g, other)] &&
           std::equal(pages(b, g, one), pages(b, g, one) + count, pages(b, g, other));
  }

  const AttentionArgs<T>& a_;
  const PageLists& lists_;
  std::vector<std::vector<TreePath>> paths_;  // of each row
  std::vector<Part> parts_;
  bool any_ = false;
};

// Over a cache in full precision that has a slot for every token.
template <class T>
void listed_attention(const AttentionArgs<T>& args, const PageLists& lists);

}  // namespace gw
