// SequenceAttention and its relatives: places of keys, the cache, tasks and their merging.
#include <algorithm>
#include <cstring>

#include "operator.h"

namespace dspark::ort {
namespace {

enum Form { Plain = 0, WithRotary = 1, WithSinks = 2 };

constexpr int64_t kMaxPartial = 16 << 20;  // floats of unmerged chunks

struct Sizes {
  int64_t batch, tokens, heads, kv_heads, group, key_width, value_width, capacity, kv_len, rows;  // rows: tokens * group
  int64_t added;  // new rows of the cache; the tokens that ask are the last of them

  int64_t before() const { return added - tokens; }
};

struct Rotary {
  const float *cos = nullptr, *sin = nullptr;
  int64_t turned = 0;
  bool table = false, shared = false;  // shared: one sequence's angles for all

  const float* row(const float* from, const Sizes& s, int64_t b, int64_t t, int64_t position) const {  // t: of the new rows
    if (!from) return nullptr;
    return from + (table ? position : (shared ? 0 : b * s.added) + t) * (turned / 2);
  }
};

// One sequence of the batch: which keys its rows see, by place.
struct Sequence {
  int64_t start, direct, chunks, bits_chunks;
  const uint16_t* bits;
  const Visible* others;
  const int32_t* first;
};

std::string number(int64_t n) { return std::to_string(n); }

class AttentionKernel : public Kernel {
 public:
  AttentionKernel(int form, const Attributes& a)
      : form_(form), heads_(a.integer("heads")), scale_(a.real("scale")), softcap_(a.real("softcap", 0)),
        offsets_{a.integer("query_offset", 0), a.integer("key_offset", 0), a.integer("value_offset", 0)},
        interleaved_(a.integer("interleaved", 0) != 0), set_(*chosen_set()) {
    need(heads_ > 0, "heads = " + number(heads_) + " must be positive");
    need(softcap_ >= 0, "softcap must not be negative");
    for (const int64_t offset : offsets_) need(offset >= 0 && offset <= INT32_MAX, "offsets must be numbers of columns");
  }

  void compute(const Call& call) const override {
    const Tensor query = call.input(0, "query"), key = call.input(1, "key"), value = call.input(2, "value");
    const Tensor past_key = call.input(3, "past_key"), past_value = call.input(4, "past_value"), mask = call.input(5, "attention_mask");
    const Tensor starts = call.input(6, "write_indices"), positions = call.input(7, "position_ids");
    const Sizes s = sizes(query, key, past_key, past_value, mask);
    check_new(query, s, s.tokens, offsets_[0], s.heads * s.key_width);
    check_new(key, s, s.added, offsets_[1], s.kv_heads * s.key_width);
    check_new(value, s, s.added, offsets_[2], s.kv_heads * s.value_width);
    need(starts.shape == Shape{s.batch}, starts.text() + " must be [" + number(s.batch) + "]");
    need(positions.shape == Shape({s.batch, s.added}), positions.text() + " must be " + Shape({s.batch, s.added}).text());
    for (int64_t b = 0; b < s.batch; b++) check_start(starts.as<int64_t>()[b], s);
    const Rotary rotary = form_ & WithRotary ? read_rotary(call, s, positions) : Rotary();
    const float* sinks = form_ & WithSinks ? read_sinks(call, s) : nullptr;

    float* y = static_cast<float*>(call.output(0, {s.batch, s.tokens, s.heads * s.value_width}));
    float* keys = cache(call, 1, past_key);
    float* values = cache(call, 2, past_value);
    if (!s.batch || !s.added) return;

    Pieces pieces;
    const int64_t mask_chunks = (s.kv_len + kChunk - 1) / kChunk;
    const size_t turned = pieces.add<float>(s.batch * s.heads * s.tokens * s.key_width);
    const size_t bits = pieces.add<uint16_t>(s.batch * s.tokens * mask_chunks * kGroups);
    const size_t first = pieces.add<int32_t>(s.batch * (s.tokens + 1));
    const size_t others = pieces.add<Visible>(count_others(mask, s, starts, positions));
    const size_t sequences = pieces.add<Sequence>(s.batch);
    const int64_t partial = partial_rows(s);
    const size_t maxima = pieces.add<float>(partial), sums = pieces.add<float>(partial), parts = pieces.add<float>(partial * s.value_width);
    pieces.take(Memory::Operator);

    Sequence* sequence = pieces.at<Sequence>(sequences);
    Visible* free_others = pieces.at<Visible>(others);
    for (int64_t b = 0; b < s.batch; b++) {
      sequence[b] = order(mask, s, b, starts, positions, pieces.at<int32_t>(first) + b * (s.tokens + 1), free_others);
      sequence[b].bits = pieces.at<uint16_t>(bits) + b * s.tokens * mask_chunks * kGroups;
      free_others += sequence[b].first[s.tokens];
    }
    write_new(call, s, query, key, value, rotary, positions, sequence, mask, pieces.at<float>(turned), pieces.at<uint16_t>(bits), mask_chunks, keys, values);
    const Results results = {pieces.at<float>(maxima), pieces.at<float>(sums), pieces.at<float>(parts), partial};
    run(call, s, sequence, pieces.at<float>(turned), keys, values, sinks, results, y);
  }

 private:
  struct Results {
    float *maximum, *sum, *values;
    int64_t rows;   // room
  };

  // Shapes

  Sizes sizes(const Tensor& query, const Tensor& key, const Tensor& past_key, const Tensor& past_value, const Tensor& mask) const {
    need(query.shape.rank == 3 || query.shape.rank == 4, query.text() + " must be [batch, tokens, columns] or [batch, tokens, heads, columns]");
    const Shape &k = past_key.shape, &v = past_value.shape, &m = mask.shape;
    need(k.rank == 4 && v.rank == 4 && k[0] == v[0] && k[1] == v[1] && k[2] == v[2],
         past_key.text() + " and " + past_value.text() + " must be [batch, kv_heads, capacity, width], equal but for the width");
    need(key.shape.rank >= 2 && key.shape[1] >= query.shape[1], key.text() + " must have the tokens of " + query.text() + " or more");
    Sizes s = {query.shape[0], query.shape[1], heads_, k[1], 0, k[3], v[3], k[2], 0, 0, key.shape[1]};
    need(k[0] == s.batch, past_key.text() + " has another batch than " + query.text());
    need(s.kv_heads > 0 && s.heads % s.kv_heads == 0, number(s.heads) + " heads are not a multiple of the " + number(s.kv_heads) + " of " + past_key.text());
    for (const int64_t width : {s.key_width, s.value_width})
      need(width >= 1 && width <= kMaxWidth, "a head's width of " + number(width) + " is outside 1.." + number(kMaxWidth));
    need(m.rank == 4 && (m[0] == s.batch || m[0] == 1) && m[1] == 1 && m[2] == s.tokens,
         mask.text() + " must be [" + number(s.batch) + ", 1, " + number(s.tokens) + ", kv_len]");
    s.kv_len = m[3];
    need(s.kv_len <= s.capacity, mask.text() + " is longer than the capacity " + number(s.capacity));
    need(s.capacity < INT32_MAX / 2 && s.added * s.heads < INT32_MAX, "more slots or rows than can be numbered");
    s.group = s.heads / s.kv_heads;
    s.rows = s.tokens * s.group;
    return s;
  }

  static void check_new(const Tensor& t, const Sizes& s, int64_t tokens, int64_t offset, int64_t columns) {
    need((t.shape.rank == 3 || t.shape.rank == 4) && t.shape[0] == s.batch && t.shape[1] == tokens,
         t.text() + " must begin with [" + number(s.batch) + ", " + number(tokens) + "]");
    need(offset + columns <= t.shape.size(2), t.text() + " has no columns " + number(offset) + ".." + number(offset + columns));
  }

  static void check_start(int64_t start, const Sizes& s) {
    need(start >= 0 && start <= s.kv_len - s.added,
         "write_indices " + number(start) + " and " + number(s.added) + " tokens do not fit kv_len " + number(s.kv_len));
  }

  static Rotary read_rotary(const Call& call, const Sizes& s, const Tensor& positions) {
    const Tensor cos = call.input(8, "cos"), sin = call.input(9, "sin");
    const Shape& c = cos.shape;
    need(sin.shape == c, cos.text() + " and " + sin.text() + " differ");
    need(c.rank == 2 || (c.rank == 3 && (c[0] == s.batch || c[0] == 1) && c[1] == s.added),
         cos.text() + " must be [positions, width / 2] or [" + number(s.batch) + ", " + number(s.added) + ", width / 2]");
    const int64_t turned = 2 * c[c.rank - 1];
    need(turned <= s.key_width, cos.text() + " turns " + number(turned) + " columns of a head of " + number(s.key_width));
    if (c.rank == 2)
      for (int64_t i = 0; i < positions.shape.size(); i++) {
        const int64_t p = positions.as<int64_t>()[i];
        need(p >= 0 && p < c[0], "position " + number(p) + " is outside the rotary tables of " + number(c[0]) + " rows");
      }
    return {cos.as<float>(), sin.as<float>(), turned, c.rank == 2, c.rank == 3 && c[0] == 1};
  }

  const float* read_sinks(const Call& call, const Sizes& s) const {
    const Tensor sinks = call.input(form_ & WithRotary ? 10 : 8, "sinks");
    need(sinks.shape == Shape{s.heads}, sinks.text() + " must be [" + number(s.heads) + "]");
    return sinks.as<float>();
  }

  static float* cache(const Call& call, size_t output, const Tensor& past) {
    float* present = static_cast<float*>(call.output(output, past.shape));
    if (present != past.data && past.shape.size()) std::memcpy(present, past.data, static_cast<size_t>(past.shape.size()) * sizeof(float));
    return present;
  }

  // Places

  static const uint8_t* mask_row(const Tensor& mask, const Sizes& s, int64_t b, int64_t t) {
    return mask.as<uint8_t>() + ((mask.shape[0] == 1 ? 0 : b) * s.tokens + t) * s.kv_len;
  }

  // Place of a new row after the sequence's first new row. Unsigned: positions may be anything.
  static uint64_t after(const int64_t* position, int64_t i) { return static_cast<uint64_t>(position[i]) - static_cast<uint64_t>(position[0]); }

  // New rows that lie where their place is, counted from the first.
  static int64_t leading(const int64_t* position, int64_t tokens) {
    int64_t n = 0;
    while (n < tokens && after(position, n) == static_cast<uint64_t>(n)) n++;
    return n;
  }

  static int64_t count_others(const Tensor& mask, const Sizes& s, const Tensor& starts, const Tensor& positions) {
    int64_t count = 0;
    for (int64_t b = 0; b < s.batch; b++) {
      const int64_t lead = leading(positions.as<int64_t>() + b * s.added, s.added);
      for (int64_t t = 0; lead < s.added && t < s.tokens; t++) {
        const uint8_t* seen = mask_row(mask, s, b, t) + starts.as<int64_t>()[b];
        for (int64_t i = lead; i < s.added; i++) count += seen[i] != 0;
      }
    }
    return count;
  }

  static Sequence order(const Tensor& mask, const Sizes& s, int64_t b, const Tensor& starts, const Tensor& positions, int32_t* first, Visible* others) {
    const int64_t start = starts.as<int64_t>()[b];
    const int64_t* position = positions.as<int64_t>() + b * s.added;
    const int64_t lead = leading(position, s.added), direct = start + lead;
    int64_t end = direct;
    int32_t count = 0;
    for (int64_t t = 0; t < s.tokens; t++) {
      first[t] = count;
      if (lead == s.added) continue;
      const uint8_t* seen = mask_row(mask, s, b, t) + start;
      const bool ascending = ascends(seen, position, s.added);
      for (int64_t i = lead; i < s.added; i++) {
        if (!seen[i]) continue;
        const int64_t place = start + (ascending ? static_cast<int64_t>(after(position, i)) : i);
        others[count++] = {static_cast<int32_t>(start + i), static_cast<int32_t>(place)};
        end = std::max(end, place + 1);
      }
    }
    first[s.tokens] = count;
    return {start, direct, (end + kChunk - 1) / kChunk, (direct + kChunk - 1) / kChunk, nullptr, others, first};
  }

  // Whether the new rows that a row sees have ascending places among those of the pass, `tokens` of them.
  static bool ascends(const uint8_t* seen, const int64_t* position, int64_t tokens) {
    int64_t last = -1;
    for (int64_t i = 0; i < tokens; i++) {
      if (!seen[i]) continue;
      const uint64_t place = after(position, i);
      if (place >= static_cast<uint64_t>(tokens) || static_cast<int64_t>(place) <= last) return false;
      last = static_cast<int64_t>(place);
    }
    return true;
  }

  // New rows

  void write_new(const Call& call, const Sizes& s, const Tensor& query, const Tensor& key, const Tensor& value, const Rotary& rotary,
                 const Tensor& positions, const Sequence* sequence, const Tensor& mask, float* turned, uint16_t* bits, int64_t mask_chunks,
                 float* keys, float* values) const {
    const int64_t all = s.batch * s.added;
    const int64_t tasks = tasks_for(all * ((s.heads + 2 * s.kv_heads) * s.key_width / 4 + s.kv_len / 16), all);
    call.parallel(tasks, [&](int64_t task) {
      for (int64_t i = all * task / tasks; i < all * (task + 1) / tasks; i++) {
        const int64_t b = i / s.added, row = i % s.added, t = row - s.before(), position = positions.as<int64_t>()[i], slot = sequence[b].start + row;
        const float* cos = rotary.row(rotary.cos, s, b, row, position);
        const float* sin = rotary.row(rotary.sin, s, b, row, position);
        const float* k = key.as<float>() + i * key.shape.size(2) + offsets_[1];
        const float* v = value.as<float>() + i * value.shape.size(2) + offsets_[2];
        for (int64_t h = 0; h < s.kv_heads; h++) {
          const int64_t at = (b * s.kv_heads + h) * s.capacity + slot;
          set_.turn({k + h * s.key_width, cos, sin, keys + at * s.key_width, s.key_width, rotary.turned, interleaved_, 1.0f});
          std::memcpy(values + at * s.value_width, v + h * s.value_width, static_cast<size_t>(s.value_width) * sizeof(float));
        }
        if (t < 0) continue;
        const float* q = query.as<float>() + (b * s.tokens + t) * query.shape.size(2) + offsets_[0];
        for (int64_t h = 0; h < s.heads; h++) {
          float* to = turned + ((b * s.kv_heads + h / s.group) * s.rows + t * s.group + h % s.group) * s.key_width;
          set_.turn({q + h * s.key_width, cos, sin, to, s.key_width, rotary.turned, interleaved_, scale_});
        }
        const uint8_t* seen = mask_row(mask, s, b, t);
        uint16_t* to = bits + b * s.tokens * mask_chunks * kGroups + t * sequence[b].bits_chunks * kGroups;
        for (int64_t c = 0; c < sequence[b].bits_chunks; c++)
          set_.mask_bits(seen + c * kChunk, std::min<int64_t>(kChunk, sequence[b].direct - c * kChunk), to + c * kGroups);
      }
    });
  }

  // Tasks

  int64_t partial_rows(const Sizes& s) const {
    const int64_t chunks = (s.kv_len + kChunk - 1) / kChunk, rows = s.batch * s.heads * s.tokens * chunks;
    return chunks > 1 && rows * s.value_width <= kMaxPartial ? rows : 0;
  }

  Attend task(const Sizes& s, const Sequence& q, int64_t b, int64_t h, const float* turned, const float* keys, const float* values) const {
    Attend a = {};
    const int64_t head = b * s.kv_heads + h;
    a.query = turned + head * s.rows * s.key_width;
    a.key = keys + head * s.capacity * s.key_width;
    a.value = values + head * s.capacity * s.value_width;
    a.key_width = s.key_width, a.value_width = s.value_width, a.group = s.group, a.softcap = softcap_;
    a.direct = q.direct, a.start = q.start, a.tokens = s.added;
    a.bits = q.bits, a.bits_chunks = q.bits_chunks, a.others = q.others, a.first = q.first;
    return a;
  }

  // Writes a row of y from its merged state.
  void write(const Sizes& s, int64_t b, int64_t h, int64_t row, const float* sinks, float maximum, float sum, float* state, float* y) const {
    const int64_t head = h * s.group + row % s.group;
    if (sinks) set_.merge(&maximum, &sum, state, sinks[head], 1.0f, nullptr, s.value_width);
    set_.finish(sum, state, s.value_width, y + ((b * s.tokens + row / s.group) * s.heads + head) * s.value_width);
  }

  void run(const Call& call, const Sizes& s, const Sequence* sequence, const float* turned, const float* keys, const float* values,
           const float* sinks, const Results& results, float* y) const {
    if (!s.tokens) return;
    int64_t chunks = 1;
    for (int64_t b = 0; b < s.batch; b++) chunks = std::max(chunks, sequence[b].chunks);
    const int64_t streams = s.batch * s.kv_heads;
    const int64_t work = s.batch * s.heads * s.tokens * std::min(s.kv_len, chunks * kChunk) * (s.key_width + s.value_width) / 25;
    const int64_t wanted = tasks_for(work + 4000, INT32_MAX);
    // Chunks first, since they share nothing; then rows, which turn the same keys again.
    const bool split = results.rows && streams * ((s.rows + kRowBlock - 1) / kRowBlock) < 2 * wanted;
    const int64_t units = streams * (split ? chunks : 1);
    int64_t blocks = std::max((s.rows + kRowBlock - 1) / kRowBlock, std::min(s.rows / 6, (wanted + units - 1) / units));
    blocks = std::max<int64_t>(1, blocks);
    const auto begin = [&](int64_t block) { return s.rows * block / blocks; };
    if (!split) {
      call.parallel(streams * blocks, [&](int64_t i) {
        const int64_t b = i / blocks / s.kv_heads, h = i / blocks % s.kv_heads, r0 = begin(i % blocks), r1 = begin(i % blocks + 1);
        Attend a = task(s, sequence[b], b, h, turned, keys, values);
        Pieces mine;
        const size_t scratch = mine.add<float>(attend_scratch(s.key_width, s.value_width, s.added)), state = mine.add<float>(kRowBlock * s.value_width);
        float maximum[kRowBlock], sum[kRowBlock];
        mine.take(Memory::Task);
        a.row0 = r0, a.row1 = r1, a.chunk1 = sequence[b].chunks, a.merge = true;
        a.maximum = maximum, a.sum = sum, a.values = mine.at<float>(state), a.scratch = mine.at<float>(scratch);
        set_.attend(a);
        for (int64_t r = r0; r < r1; r++) write(s, b, h, r, sinks, maximum[r - r0], sum[r - r0], a.values + (r - r0) * s.value_width, y);
      });
      return;
    }
    call.parallel(streams * chunks * blocks, [&](int64_t i) {
      const int64_t c = i / blocks % chunks, stream = i / blocks / chunks, b = stream / s.kv_heads;
      if (c >= sequence[b].chunks) return;
      Attend a = task(s, sequence[b], b, stream % s.kv_heads, turned, keys, values);
      Pieces mine;
      const size_t scratch = mine.add<float>(attend_scratch(s.key_width, s.value_width, s.added));
      mine.take(Memory::Task);
      a.row0 = begin(i % blocks), a.row1 = begin(i % blocks + 1), a.chunk0 = c, a.chunk1 = c + 1;
      const int64_t at = (stream * chunks + c) * s.rows + a.row0;
      a.result_rows = s.rows, a.maximum = results.maximum + at, a.sum = results.sum + at, a.values = results.values + at * s.value_width;
      a.scratch = mine.at<float>(scratch);
      set_.attend(a);
    });
    merge_chunks(call, s, sequence, chunks, sinks, results, y);
  }

  void merge_chunks(const Call& call, const Sizes& s, const Sequence* sequence, int64_t chunks, const float* sinks, const Results& results, float* y) const {
    const int64_t all = s.batch * s.kv_heads * s.rows, tasks = tasks_for(all * chunks * (s.value_width + 64) / 8, all);
    call.parallel(tasks, [&](int64_t task) {
      float* state = static_cast<float*>(memory(Memory::Task, kMaxWidth * sizeof(float)));
      for (int64_t i = all * task / tasks; i < all * (task + 1) / tasks; i++) {
        const int64_t stream = i / s.rows, row = i % s.rows, b = stream / s.kv_heads;
        float maximum = -__builtin_inff(), sum = 0;
        std::fill_n(state, s.value_width, 0.0f);
        for (int64_t c = 0; c < sequence[b].chunks; c++) {
          const int64_t at = (stream * chunks + c) * s.rows + row;
          if (results.sum[at] != 0)
            set_.merge(&maximum, &sum, state, results.maximum[at], results.sum[at], results.values + at * s.value_width, s.value_width);
        }
        write(s, b, stream % s.kv_heads, row, sinks, maximum, sum, state, y);
      }
    });
  }

  int form_;
  int64_t heads_;
  float scale_, softcap_;
  int64_t offsets_[3];
  bool interleaved_;
  const Set& set_;
};

std::unique_ptr<Kernel> make(const Operator& self, const Attributes& a) { return std::make_unique<AttentionKernel>(self.kind, a); }

}  // namespace

void add_attention(std::vector<Operator>& to) {
  static constexpr const char* names[] = {"SequenceAttention", "RotaryAttention", "SinkAttention", "RotarySinkAttention"};
  for (int form = 0; form < 4; form++) {
    std::vector<int> inputs = {Float32, Float32, Float32, Float32, Float32, Bool, Int64, Int64};
    if (form & WithRotary) inputs.insert(inputs.end(), {Float32, Float32});
    if (form & WithSinks) inputs.push_back(Float32);
    to.push_back({names[form], inputs, {Float32, Float32, Float32}, make, form});
  }
}

}  // namespace dspark::ort
