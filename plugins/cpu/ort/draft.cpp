// BlockDraft and its relatives: a block drafter's tokens, slot by slot, and the most likely texts of the block.
//
// A slot costs one reading of the correction's matrix, for the tokens of all sequences and texts at once: a few kilobytes of
// logits at a time, which never reach memory but where they are drawn from.
#include <algorithm>
#include <cstring>

#include "weights.h"

namespace dspark::ort {
namespace {

constexpr int64_t kMaxCandidates = 64;
constexpr int64_t kGroupRows = 16;  // rows whose logits of a piece lie in a task's memory together
constexpr int kWithoutMarkov = -1;

std::string number(int64_t n) { return std::to_string(n); }

// A table of rows in any float type.
struct Table {
  int type = Float32;
  int64_t rows = 0, width = 0;
  const void* data = nullptr;

  void read(int64_t row, float* to) const {
    if (type == Float32) {
      std::copy_n(static_cast<const float*>(data) + row * width, width, to);
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(data) + row * width;
    for (int64_t i = 0; i < width; i++) to[i] = type == BFloat16 ? from_bits(static_cast<uint32_t>(from[i]) << 16) : half(from[i]);
  }

 private:
  static float from_bits(uint32_t bits) {
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  }
  static float half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
};

// Sequences, slots, draft tokens, candidates, texts that are followed, and the rank of the correction (0: none).
struct Sizes {
  int64_t batch, slots, vocab, candidates, beams, rank;

  int64_t pieces() const { return (vocab + kColumns - 1) / kColumns; }
  int64_t most_rows() const { return batch * (1 + (rank ? beams : 0)); }
  int64_t nodes() const { return beams ? candidates + (slots - 1) * beams * candidates : 0; }
  int64_t width(int64_t piece) const { return std::min<int64_t>(kColumns, vocab - piece * kColumns); }
};

struct Inputs {
  const float *base, *temperature, *uniforms, *forbidden;  // forbidden: null where everything may be drafted
  const int64_t *anchors, *ids;                            // ids: the target's, null where draft ids are those
  Table anchor_rows, drafted_rows;
  Weights correction;

  int64_t target_id(int64_t token) const { return ids ? ids[token] : token; }
};

struct Outputs {
  int64_t *tokens, *candidates, *beam_tokens, *beam_parents;
  float *probs, *candidate_probs, *beam_probs, *rows;
};

// Logits that a slot is asked for: of sequence b after `token`. drawn: which place of `probs` they go to, -1 for none.
struct Row {
  int64_t b, token, drawn;
  float maximum, sum;
};

// A sequence's state from slot to slot.
struct Sequence {
  int64_t token, row;       // drafted last, and the row of its next logits
  int64_t drawn;            // place among those drawn at random, -1: none
};
struct Text {
  int64_t token, row, end;  // last token, the row of its next logits, its last node
  float reach;
};

struct Memories {
  Row* rows;
  Sequence* sequences;
  Text* texts;                  // [batch, beams]
  float *inner, *scale, *lift;  // activations of the correction
  int8_t* q;
  int32_t *start, *target;
  float *maxima, *sums;         // [rows, pieces]
  float* values;                // [tasks, rows, candidates], the largest logits a task has seen
  int32_t* columns;
  int64_t* counts;              // [tasks, rows]
};

class DraftKernel : public Kernel {
 public:
  DraftKernel(int kind, const Attributes& a)
      : markov_(kind != kWithoutMarkov), format_(markov_ ? static_cast<Format>(kind) : Format::Float32), candidates_(a.integer("candidates")),
        beams_(std::min(a.integer("beams", 0), candidates_)), range_(a.real("range", 0)), set_(*chosen_set()) {
    need(candidates_ >= 1 && candidates_ <= kMaxCandidates, "candidates = " + number(candidates_) + " is outside 1.." + number(kMaxCandidates));
    need(beams_ >= 0, "beams = " + number(beams_) + " must not be negative");
  }

  void compute(const Call& call) const override {
    Sizes s = {};
    Inputs in = {};
    read(call, &s, &in);
    int64_t drawn = 0;
    for (int64_t b = 0; b < s.batch; b++) drawn += in.temperature[b] > 0;
    const Outputs out = outputs(call, s, drawn);
    if (!s.batch || !s.slots) return;
    const int64_t tasks = tasks_for(s.most_rows() * s.vocab * (s.rank + 40) / 64, s.pieces());
    const Memories m = memories(s, tasks);
    int64_t next = 0;
    for (int64_t b = 0; b < s.batch; b++) m.sequences[b] = {in.anchors[b], 0, in.temperature[b] > 0 ? next++ : -1};
    for (int64_t slot = 0; slot < s.slots; slot++) {
      const int64_t rows = ask(s, in, slot, m, out);
      prepare(s, in, rows, m);
      call.parallel(tasks, [&](int64_t task) { look(s, in, out, slot, rows, task, tasks, m); });
      for (int64_t r = 0; r < rows; r++) gather(s, r, tasks, m);
      if (drawn) call.parallel(drawn, [&](int64_t d) { spread_drawn(s, in, slot, d, m, out); });
      for (int64_t b = 0; b < s.batch; b++) {
        choose(s, in, slot, b, m, out);
        if (s.beams) follow(s, in, slot, b, m, out);
      }
    }
  }

 private:
  // Inputs

  void read(const Call& call, Sizes* s, Inputs* in) const {
    const Tensor base = call.input(0, "base_logits"), anchors = call.input(1, "anchor_ids"), temperature = call.input(2, "temperature");
    const Tensor uniforms = call.input(3, "uniforms"), forbidden = call.input(4, "forbidden"), ids = call.input(5, "target_ids");
    need(base.shape.rank == 3, base.text() + " must be [batch, slots, draft tokens]");
    *s = {base.shape[0], base.shape[1], base.shape[2], candidates_, beams_, 0};
    need(s->vocab >= candidates_ && s->vocab <= INT32_MAX, base.text() + " must have " + number(candidates_) + " draft tokens or more");
    need(anchors.shape == Shape{s->batch}, anchors.text() + " must be [" + number(s->batch) + "]");
    need(temperature.shape == Shape{s->batch}, temperature.text() + " must be [" + number(s->batch) + "]");
    need(uniforms.shape == Shape({s->batch, s->slots}), uniforms.text() + " must be " + Shape({s->batch, s->slots}).text());
    for (const Tensor* t : {&forbidden, &ids})
      need(t->shape.size() == s->vocab || t->shape.size() == 0, t->text() + " must have " + number(s->vocab) + " values, or none");
    in->base = base.as<float>(), in->temperature = temperature.as<float>(), in->uniforms = uniforms.as<float>();
    in->anchors = anchors.as<int64_t>();
    in->forbidden = forbidden.shape.size() ? forbidden.as<float>() : nullptr;
    in->ids = ids.shape.size() ? ids.as<int64_t>() : nullptr;
    if (!markov_) return;
    in->anchor_rows = table(call, 6, "anchor_rows"), in->drafted_rows = table(call, 7, "drafted_rows");
    s->rank = in->anchor_rows.width;
    need(s->rank > 0 && in->drafted_rows.width == s->rank, "anchor_rows and drafted_rows must have rows of one length above 0");
    need(in->drafted_rows.rows >= s->vocab, "drafted_rows must have a row for each of " + number(s->vocab) + " draft tokens");
    for (int64_t b = 0; b < s->batch; b++)
      need(in->anchors[b] >= 0 && in->anchors[b] < in->anchor_rows.rows,
           "anchor " + number(in->anchors[b]) + " is outside the table of " + number(in->anchor_rows.rows) + " rows");
    in->correction = read_weights(call, 8, format_, s->rank, s->vocab, nullptr);
  }

  static Table table(const Call& call, size_t i, const char* name) {
    const Tensor t = call.input(i, name);
    need(t.shape.rank == 2 && (t.type == Float32 || t.type == Float16 || t.type == BFloat16), t.text() + " must be floats [rows, rank]");
    return {t.type, t.shape[0], t.shape[1], t.data};
  }

  static Outputs outputs(const Call& call, const Sizes& s, int64_t drawn) {
    Outputs o = {};
    const Shape nodes = s.beams ? Shape{s.batch, s.nodes()} : Shape{0};
    o.tokens = static_cast<int64_t*>(call.output(0, {s.batch, s.slots}));
    o.probs = static_cast<float*>(call.output(1, {drawn, s.slots, s.vocab}));
    o.candidates = static_cast<int64_t*>(call.output(2, {s.batch, s.slots, s.candidates}));
    o.candidate_probs = static_cast<float*>(call.output(3, {s.batch, s.slots, s.candidates}));
    o.beam_tokens = static_cast<int64_t*>(call.output(4, nodes));
    o.beam_probs = static_cast<float*>(call.output(5, nodes));
    o.beam_parents = static_cast<int64_t*>(call.output(6, nodes));
    o.rows = static_cast<float*>(call.output(7, s.rank ? Shape{s.batch, s.slots, s.rank} : Shape{0}));
    return o;
  }

  Memories memories(const Sizes& s, int64_t tasks) const {
    const int64_t rows = s.most_rows(), blocks = in_blocks(s), padded = (s.rank + 3) / 4 * 4;
    const int64_t scales = s.rank && is_quantized(format_) ? interleaved_size(rows, blocks) : 0;
    Pieces p;
    const size_t row = p.add<Row>(rows), sequence = p.add<Sequence>(s.batch), text = p.add<Text>(s.batch * s.beams);
    const size_t inner = p.add<float>(rows * s.rank), scale = p.add<float>(scales), lift = p.add<float>(scales);
    const size_t q = p.add<int8_t>(blocks ? scales / blocks * padded : 0), start = p.add<int32_t>(scales), target = p.add<int32_t>(rows);
    const size_t maxima = p.add<float>(rows * s.pieces()), sums = p.add<float>(rows * s.pieces());
    const size_t values = p.add<float>(tasks * rows * s.candidates), columns = p.add<int32_t>(tasks * rows * s.candidates), counts = p.add<int64_t>(tasks * rows);
    p.take(Memory::Operator);
    Memories m = {p.at<Row>(row), p.at<Sequence>(sequence), p.at<Text>(text), p.at<float>(inner), p.at<float>(scale), p.at<float>(lift), p.at<int8_t>(q),
                  p.at<int32_t>(start), p.at<int32_t>(target), p.at<float>(maxima), p.at<float>(sums), p.at<float>(values), p.at<int32_t>(columns), p.at<int64_t>(counts)};
    for (int64_t r = 0; r < rows; r++) m.target[r] = static_cast<int32_t>(r % kGroupRows);
    return m;
  }

  int64_t in_blocks(const Sizes& s) const { return has_blocks(format_) ? std::max<int64_t>(1, s.rank / 16) : 1; }  // at most

  // A slot: which logits are needed, their statistics, what follows from them

  // One row for each token that a sequence's chain or texts end with; returns how many.
  int64_t ask(const Sizes& s, const Inputs& in, int64_t slot, const Memories& m, const Outputs& out) const {
    int64_t rows = 0;
    for (int64_t b = 0; b < s.batch; b++) {
      const int64_t first = rows;
      Sequence& chain = m.sequences[b];
      m.rows[rows] = {b, chain.token, chain.drawn, 0, 0};
      chain.row = rows++;
      if (s.rank) read_row(in, slot, chain.token, out.rows + (b * s.slots + slot) * s.rank);
      for (int64_t i = 0; i < s.beams && slot; i++) {
        Text& text = m.texts[b * s.beams + i];
        text.row = chain.row;
        if (!s.rank) continue;
        for (text.row = first; text.row < rows && m.rows[text.row].token != text.token; text.row++) {}
        if (text.row == rows) m.rows[rows++] = {b, text.token, -1, 0, 0};
      }
    }
    for (int64_t r = 0; r < rows && s.rank; r++) read_row(in, slot, m.rows[r].token, m.inner + r * s.rank);
    return rows;
  }

  static void read_row(const Inputs& in, int64_t slot, int64_t token, float* to) { (slot ? in.drafted_rows : in.anchor_rows).read(token, to); }

  void prepare(const Sizes& s, const Inputs& in, int64_t rows, const Memories& m) const {
    if (!s.rank || !is_quantized(format_)) return;
    for (int64_t r = 0; r < rows; r++) {
      const float* x = m.inner + r * s.rank;
      if (format_ == Format::W8A8)
        set_.quantize_row(x, s.rank, range_, m.q + r * ((s.rank + 3) / 4 * 4), m.scale + r, m.start + r);
      else
        set_.quantize_blocks(x, s.rank, in.correction.block, format_, r, m.q, m.scale, m.start, m.lift);
    }
  }

  // The pieces of one task: logits, their statistics, and the largest of them.
  void look(const Sizes& s, const Inputs& in, const Outputs& out, int64_t slot, int64_t rows, int64_t task, int64_t tasks, const Memories& m) const {
    float* logits = static_cast<float*>(memory(Memory::Task, kGroupRows * kColumns * sizeof(float)));
    int64_t* counts = m.counts + task * s.most_rows();
    std::fill_n(counts, rows, 0);
    for (int64_t piece = s.pieces() * task / tasks; piece < s.pieces() * (task + 1) / tasks; piece++) {
      const int64_t column = piece * kColumns, n = s.width(piece);
      for (int64_t r0 = 0; r0 < rows; r0 += kGroupRows) {
        const int64_t r1 = std::min(rows, r0 + kGroupRows);
        if (s.rank)
          set_.product({columns_of(in.correction, column, n), {m.inner, m.q, m.scale, m.start, m.lift}, logits, m.target, r0, r1, 0, tiles_of(n)});
        else
          std::fill_n(logits, (r1 - r0) * n, 0.0f);
        for (int64_t r = r0; r < r1; r++) {
          float* x = logits + (r - r0) * n;
          const Row& row = m.rows[r];
          const int64_t at = r * s.pieces() + piece, list = (task * s.most_rows() + r) * s.candidates;
          set_.likely(x, in.base + (row.b * s.slots + slot) * s.vocab + column, in.forbidden ? in.forbidden + column : nullptr, n, m.maxima + at, m.sums + at);
          // Most pieces have none of the largest.
          if (counts[r] < s.candidates || m.maxima[at] > m.values[list + s.candidates - 1])
            counts[r] = set_.top(x, n, column, s.candidates, counts[r], m.values + list, m.columns + list);
          if (row.drawn >= 0) std::copy_n(x, n, out.probs + (row.drawn * s.slots + slot) * s.vocab + column);
        }
      }
    }
  }

  // `n` columns of a matrix from `column` on, which begins a tile.
  static Weights columns_of(Weights w, int64_t column, int64_t n) {
    const int64_t tile = column / kTile;
    w.data += tile * weight_bytes(w);
    if (w.scale) w.scale += tile * scale_bytes(w);
    if (w.minimum) w.minimum += tile * scale_bytes(w);
    w.N = n;
    return w;
  }

  // Merges what pieces and tasks found of a row. The largest end up in the list of task 0.
  void gather(const Sizes& s, int64_t r, int64_t tasks, const Memories& m) const {
    Row& row = m.rows[r];
    row.maximum = -__builtin_inff(), row.sum = 0;
    for (int64_t at = r * s.pieces(); at < (r + 1) * s.pieces(); at++)
      if (m.sums[at] != 0) set_.merge(&row.maximum, &row.sum, nullptr, m.maxima[at], m.sums[at], nullptr, 0);
    float* values = m.values + r * s.candidates;
    int32_t* columns = m.columns + r * s.candidates;
    int64_t& have = m.counts[r];
    for (int64_t task = 1; task < tasks; task++) {
      const int64_t list = task * s.most_rows() + r;
      for (int64_t i = 0; i < m.counts[list]; i++) {
        const float v = m.values[list * s.candidates + i];
        if (have == s.candidates && !(v > values[have - 1])) break;
        int64_t at = have < s.candidates ? have++ : have - 1;
        for (; at > 0 && v > values[at - 1]; at--) values[at] = values[at - 1], columns[at] = columns[at - 1];
        values[at] = v, columns[at] = m.columns[list * s.candidates + i];
      }
    }
  }

  // Probabilities of a row's candidates.
  void probabilities(const Sizes& s, const Row& row, const float* values, float* to) const {
    set_.spread(values, s.candidates, 1.0f, row.maximum, to);
    for (int64_t i = 0; i < s.candidates; i++) to[i] = row.sum == 0 ? 0 : to[i] / row.sum;
  }

  // Logits of a drawn sequence to probabilities, and the token that its number draws.
  void spread_drawn(const Sizes& s, const Inputs& in, int64_t slot, int64_t drawn, const Memories& m, const Outputs& out) const {
    Sequence* chain = m.sequences;
    while (chain->drawn != drawn) chain++;
    const int64_t b = chain - m.sequences;
    const float heat = in.temperature[b], maximum = m.rows[chain->row].maximum / heat;
    float* probs = out.probs + (drawn * s.slots + slot) * s.vocab;
    float* sums = static_cast<float*>(memory(Memory::Task, static_cast<size_t>(s.pieces()) * sizeof(float)));
    float total = 0;
    for (int64_t piece = 0; piece < s.pieces(); piece++) {
      float* x = probs + piece * kColumns;
      sums[piece] = set_.spread(x, s.width(piece), heat, maximum, x);
      total += sums[piece];
    }
    chain->token = drawn_from(s, probs, sums, in.uniforms[b * s.slots + slot] * total);
    for (int64_t v = 0; v < s.vocab; v++) probs[v] /= total;
  }

  // The first token where the running sum passes `wanted`; it has a probability above 0 if any has.
  static int64_t drawn_from(const Sizes& s, const float* weights, const float* sums, float wanted) {
    float before = 0;
    int64_t piece = 0, last = 0;
    for (int64_t i = 0; i < s.pieces(); i++) {
      if (!(sums[i] > 0)) continue;
      piece = i;
      if (before + sums[i] > wanted) break;
      before += sums[i];
    }
    for (int64_t i = 0; i < s.width(piece); i++) {
      const int64_t column = piece * kColumns + i;
      if (!(weights[column] > 0)) continue;
      last = column;
      before += weights[column];
      if (before > wanted) break;
    }
    return last;
  }

  // The chain's token and the candidates of the slot.
  void choose(const Sizes& s, const Inputs& in, int64_t slot, int64_t b, const Memories& m, const Outputs& out) const {
    Sequence& chain = m.sequences[b];
    const int32_t* columns = m.columns + chain.row * s.candidates;
    const int64_t at = b * s.slots + slot;
    for (int64_t i = 0; i < s.candidates; i++) out.candidates[at * s.candidates + i] = in.target_id(columns[i]);
    probabilities(s, m.rows[chain.row], m.values + chain.row * s.candidates, out.candidate_probs + at * s.candidates);
    if (chain.drawn < 0) chain.token = columns[0];
    out.tokens[at] = in.target_id(chain.token);
  }

  // The nodes of the slot, and the texts that go on.
  void follow(const Sizes& s, const Inputs& in, int64_t slot, int64_t b, const Memories& m, const Outputs& out) const {
    Text* texts = m.texts + b * s.beams;
    const int64_t width = slot ? s.beams : 1, before = slot ? s.candidates + (slot - 1) * s.beams * s.candidates : 0;
    float reach[kMaxCandidates];
    int64_t place[kMaxCandidates], kept = 0;
    Text next[kMaxCandidates];
    for (int64_t t = 0; t < width; t++) {
      const int64_t row = slot ? texts[t].row : m.sequences[b].row, at = b * s.nodes() + before + t * s.candidates;
      const int32_t* columns = m.columns + row * s.candidates;
      float* probs = out.beam_probs + at;
      probabilities(s, m.rows[row], m.values + row * s.candidates, probs);
      for (int64_t i = 0; i < s.candidates; i++) {
        out.beam_tokens[at + i] = in.target_id(columns[i]);
        out.beam_parents[at + i] = slot ? texts[t].end : -1;
        const float found = slot ? probs[i] * texts[t].reach : probs[i];
        if (kept == s.beams && !(found > reach[kept - 1])) continue;
        int64_t to = kept < s.beams ? kept++ : kept - 1;
        for (; to > 0 && found > reach[to - 1]; to--) reach[to] = reach[to - 1], place[to] = place[to - 1], next[to] = next[to - 1];
        reach[to] = found, place[to] = t * s.candidates + i, next[to] = {columns[i], 0, 0, found};
      }
    }
    for (int64_t i = 0; i < s.beams; i++) texts[i] = {next[i].token, 0, before + place[i], reach[i]};
  }

  bool markov_;
  Format format_;
  int64_t candidates_, beams_;
  float range_;
  const Set& set_;
};

std::unique_ptr<Kernel> make(const Operator& self, const Attributes& a) { return std::make_unique<DraftKernel>(self.kind, a); }

}  // namespace

void add_drafts(std::vector<Operator>& to) {
  const std::vector<int> outputs = {Int64, Float32, Int64, Float32, Int64, Float32, Int64, Float32};
  const std::vector<int> common = {Float32, Int64, Float32, Float32, Float32, Int64};
  to.push_back({"BlockDraft", common, outputs, make, kWithoutMarkov});
  for (int f = 0; f < kFormats; f++) {
    const Format format = static_cast<Format>(f);
    std::vector<int> inputs = common;
    inputs.insert(inputs.end(), {Any, Any});
    for (const int type : weight_types(format)) inputs.push_back(type);
    to.push_back({kept(std::string("MarkovDraft") + facts(format).name), inputs, outputs, make, f});
  }
}

}  // namespace dspark::ort
