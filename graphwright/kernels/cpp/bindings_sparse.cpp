// The ops `graphwright_cpp::score_pages` and `choose_pages`, and lists of pages for those that read them.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "bindings.h"
#include "page_scores.h"

namespace gw::bind {

std::optional<Lists> read_lists(const OptionalTensor& pages0, const OptionalTensor& chosen0, int64_t page, int64_t first,
                                const StepShape& step) {
  const bool given = pages0 && pages0->defined();
  TORCH_CHECK(given == (chosen0 && chosen0->defined()), "graphwright_cpp: lists of pages come with their lengths");
  if (!given) return std::nullopt;
  const Tensor pages = pages0->contiguous(), chosen = chosen0->contiguous();
  check_dtype(pages, at::kInt, "pages");
  check_dtype(chosen, at::kInt, "chosen");
  const auto fits = [&](const Tensor& x, int64_t dims) {
    return x.dim() == dims && x.size(0) == step.batch && x.size(1) == step.tokens && x.size(2) == step.groups;
  };
  TORCH_CHECK(fits(pages, 4) && fits(chosen, 3), "graphwright_cpp: lists ", pages.sizes(), " and lengths ",
              chosen.sizes(), " for ", step.batch, " rows of ", step.tokens, " tokens and ", step.groups, " groups");
  TORCH_CHECK(page > 0 && first >= 0 && !step.window, "graphwright_cpp: lists of pages of ", page, " tokens after ",
              first, " and a window of ", step.window);
  for (int64_t b = 0; b < step.batch; ++b)
    TORCH_CHECK(step.lengths[b] >= 0 && step.lengths[b] + step.counts[b] <= step.slots, "graphwright_cpp: row ", b,
                " has ", step.lengths[b], " + ", step.counts[b], " tokens in ", step.slots,
                " slots, and lists name tokens by slot");
  const int64_t capacity = pages.size(3);
  const auto *list = pointer<const int32_t>(pages), *count = pointer<const int32_t>(chosen);
  for (int64_t i = 0; i < chosen.numel(); ++i, list += capacity) {
    bool good = count[i] <= capacity;
    for (int64_t k = 0; good && k < count[i]; ++k) good = list[k] > (k ? list[k - 1] : -1);
    TORCH_CHECK(good, "graphwright_cpp: list ", i, " of ", count[i], " pages is not ascending or too long");
  }
  const gw::PageLists args{pointer<const int32_t>(pages), pointer<const int32_t>(chosen), capacity, page, first};
  return Lists{pages, chosen, args};
}

}  // namespace gw::bind

namespace {

using namespace gw::bind;

// The tensors of a selection, alive while it is used.
struct Selected {
  Tensor positions, lengths, counts, dense;
  gw::Selection step;
};

Selected select(const Tensor& positions, const Tensor& lengths, const Tensor& counts, const Tensor& dense,
                at::IntArrayRef shape, int64_t page, int64_t first, int64_t recent, int64_t settled) {
  Selected s{positions.contiguous(), lengths.contiguous(), counts.contiguous(), dense.contiguous(), {}};
  check_step(s.lengths, s.counts, shape[0]);
  check_dtype(s.positions, at::kLong, "positions");
  check_dtype(s.dense, at::kLong, "dense");
  TORCH_CHECK(s.positions.numel() == shape[0] * shape[1] && s.dense.numel() == shape[0], "graphwright_cpp: positions ",
              positions.sizes(), " and dense ", dense.sizes(), " for scores ", shape);
  TORCH_CHECK(page > 0 && first >= 0 && recent >= 0 && settled >= 0, "graphwright_cpp: pages of ", page, " after ",
              first, ", recent ", recent, ", settled ", settled);
  s.step = {pointer<const int64_t>(s.positions), pointer<const int64_t>(s.lengths), pointer<const int64_t>(s.dense),
            shape[0], shape[1], shape[2], shape[3], page, first, recent, settled};
  return s;
}

// A selector's name: its text up to its options.
std::string name_of(c10::string_view text) {
  const std::string all(text);
  return all.substr(0, std::min(all.find('('), all.find_last_not_of(' ') + 1));
}

template <class T>
void score(const Tensor& q0, const Tensor& summary, const Selected& selected, c10::string_view selector, double scale,
           const Tensor& out) {
  const Tensor q = unit_last(q0);
  gw::ScoreArgs<T> a{};
  a.scorer = gw::page_scorer<T>(name_of(selector).c_str());
  TORCH_CHECK(a.scorer, "graphwright_cpp: no kernel for the selector ", std::string(selector));
  check_dtype(summary, Scalar<T>::type, "a summary");
  a.step = selected.step, a.counts = pointer<const int64_t>(selected.counts);
  a.heads = q.size(1), a.d = q.size(3);
  // [B, N, G, rows, d], without rows where there is one
  TORCH_CHECK(summary.dim() >= 4 && summary.size(0) == a.step.batch && summary.size(2) == a.step.groups &&
                  summary[0][0][0].numel() == a.scorer->rows * a.d && summary[0][0][0].is_contiguous() &&
                  a.heads % a.step.groups == 0,
              "graphwright_cpp: q ", q.sizes(), " and a summary ", summary.sizes(), " do not fit");
  a.q = pointer<const T>(q), a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_token = q.stride(2);
  a.summary = pointer<const T>(summary);
  a.s_batch = summary.stride(0), a.s_page = summary.stride(1), a.s_group = summary.stride(2);
  a.out = pointer<float>(out), a.scale = float(scale), a.threads = threads();
  gw::score_pages<T>(a);
}

Tensor score_pages(const Tensor& q, at::TensorList summary, at::TensorList constants, const Tensor& positions,
                   const Tensor& lengths, const Tensor& counts, const Tensor& dense, c10::string_view selector,
                   int64_t groups, int64_t page, int64_t first, int64_t recent, int64_t settled, double scale) {
  TORCH_CHECK(q.dim() == 4 && summary.size() == 1 && groups > 0, "graphwright_cpp: q ", q.sizes(), " with ",
              summary.size(), " summaries for ", groups, " groups");
  const int64_t shape[] = {q.size(0), q.size(2), groups, summary[0].size(1)};
  const Tensor out = at::empty(shape, q.options().dtype(at::kFloat));
  if (q.size(2) > gw::SPARSE_TOKENS || out.numel() == 0) return out;
  const Selected selected = select(positions, lengths, counts, dense, shape, page, first, recent, settled);
  if (q.scalar_type() == at::kBFloat16) score<gw::bf16>(q, summary[0], selected, selector, scale, out);
  else check_dtype(q, at::kFloat, "q"), score<float>(q, summary[0], selected, selector, scale, out);
  return out;
}

std::tuple<Tensor, Tensor> choose_pages(const Tensor& scores0, const Tensor& positions, const Tensor& lengths,
                                        const Tensor& counts, const Tensor& dense, int64_t page, int64_t first,
                                        int64_t recent, int64_t settled, int64_t sinks, double keep, double share) {
  TORCH_CHECK(scores0.dim() == 4, "graphwright_cpp: scores are ", scores0.sizes());
  check_dtype(scores0, at::kFloat, "scores");
  const auto options = scores0.options().dtype(at::kInt);
  const Tensor lists = at::empty(scores0.sizes(), options);
  const auto shape = scores0.sizes().slice(0, 3);
  if (scores0.size(1) > gw::SPARSE_TOKENS) return {lists, at::full(shape, -1, options)};
  const Tensor chosen = at::empty(shape, options);
  if (chosen.numel() == 0) return {lists, chosen};
  const Tensor scores = scores0.contiguous();
  const Selected selected = select(positions, lengths, counts, dense, scores.sizes(), page, first, recent, settled);
  gw::choose_pages({selected.step, pointer<const float>(scores), std::max<int64_t>(sinks, 0), float(keep), share,
                    pointer<int32_t>(lists), pointer<int32_t>(chosen), threads()});
  return {lists, chosen};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(graphwright_cpp, m) {
  m.def("score_pages(Tensor q, Tensor[] summary, Tensor[] constants, Tensor positions, Tensor lengths, Tensor counts, "
        "Tensor dense, str selector, int groups, int page, int first, int recent, int settled, float scale) -> Tensor");
  m.def("choose_pages(Tensor scores, Tensor positions, Tensor lengths, Tensor counts, Tensor dense, int page, "
        "int first, int recent, int settled, int sinks, float keep, float share) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(graphwright_cpp, CPU, m) {
  m.impl("score_pages", score_pages);
  m.impl("choose_pages", choose_pages);
}
