// Tables of phrases and the trees that grow from them: the compiled form of dspark_runtime/phrases/tables.py, which
// explains them. The same numbers, bit for bit: weights are integers, and probabilities are summed in the same order.
#include <algorithm>
#include <cstdint>
#include <new>
#include <queue>
#include <unordered_map>
#include <vector>

#if defined(_WIN32)
#define DSPARK_EXPORT extern "C" __declspec(dllexport)
#else
#define DSPARK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int kSources = 3, kLongest = 6, kGroups = 4, kBuckets = 16;
constexpr int kOrders[kSources] = {4, 4, 6};
constexpr size_t kMostFollowers = 16;
constexpr double kUnit = 256, kMostRate = 0.995;
constexpr double kDiscounts[kSources][kLongest + 1] = {
    {0, 3, 3, 3, 3, 0, 0}, {0, 2, 1, 1, 1, 0, 0}, {0, 2, 0.8, 0.4, 0.2, 0.1, 0.1}};
constexpr double kEdges[kBuckets - 1] = {0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97};

struct Follower {
  uint32_t token, weight;
};

struct Context {
  uint64_t total = 0, clock = 0;
  std::vector<Follower> followers;

  void count(uint32_t token, uint32_t weight) {
    total += weight;
    size_t weakest = 0;
    for (size_t i = 0; i < followers.size(); ++i) {
      if (followers[i].token == token) {
        followers[i].weight += weight;
        return;
      }
      if (followers[i].weight < followers[weakest].weight) weakest = i;
    }
    if (followers.size() < kMostFollowers)
      followers.push_back({token, weight});
    else
      followers[weakest] = {token, weight};
  }
};

struct AsItIs {  // keys are mixed already
  size_t operator()(uint64_t key) const { return static_cast<size_t>(key); }
};

int keys_of(const uint32_t* tokens, int count, int orders, uint64_t* keys) {
  uint64_t key = 0;
  const int known = std::min(count, orders);
  for (int order = 0; order < known; ++order) {
    key = (key ^ (static_cast<uint64_t>(tokens[count - 1 - order]) + 1)) * 0x9E3779B97F4A7C15ull;
    key ^= key >> 32;
    keys[order] = key;
  }
  return known;
}

struct Table {
  int orders;
  size_t most;
  uint64_t clock = 0;
  std::unordered_map<uint64_t, Context, AsItIs> contexts;

  void add(const uint32_t* tokens, int count, const uint32_t* next, const uint32_t* weights, int followers) {
    ++clock;
    uint64_t keys[kLongest];
    const int known = keys_of(tokens, count, orders, keys);
    for (int order = 0; order < known; ++order) {
      Context& context = contexts[keys[order]];
      context.clock = clock;
      for (int i = 0; i < followers; ++i) context.count(next[i], weights[i]);
    }
    forget();
  }

  void forget() {
    if (most == 0 || contexts.size() <= most) return;
    std::vector<uint64_t> clocks;
    clocks.reserve(contexts.size());
    for (const auto& entry : contexts) clocks.push_back(entry.second.clock);
    const auto middle = clocks.begin() + static_cast<std::ptrdiff_t>(clocks.size() / 2);
    std::nth_element(clocks.begin(), middle, clocks.end());
    const uint64_t least = std::min(*middle, clock - 1);
    for (auto entry = contexts.begin(); entry != contexts.end();)
      entry = entry->second.clock <= least ? contexts.erase(entry) : std::next(entry);
    if (contexts.size() > most) contexts.clear();
  }
};

struct Stored {
  const uint64_t* keys;
  const uint32_t *starts, *totals, *tokens;
  const uint16_t* weights;
  int64_t count;
};

struct Candidate {
  uint32_t token;
  int source, order;
  double chance;
};

// What is known of one source's context: a total, and each follower in turn.
class Mixture {
 public:
  void clear() { candidates_.clear(); }

  void scale(double share) {
    for (Candidate& candidate : candidates_) candidate.chance *= 1.0 - share;
  }

  void add(uint32_t token, double chance, int source, int order) {
    for (Candidate& candidate : candidates_)
      if (candidate.token == token) {
        candidate.chance += chance;
        if (source != 0 || candidate.source == 0) candidate.source = source, candidate.order = order;
        return;
      }
    candidates_.push_back({token, source, order, 0.0 + chance});
  }

  const std::vector<Candidate>& best(size_t width) {
    std::stable_sort(candidates_.begin(), candidates_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.chance > b.chance; });
    if (candidates_.size() > width) candidates_.resize(width);
    return candidates_;
  }

 private:
  std::vector<Candidate> candidates_;
};

double share_of(int source, int order, double total) { return total / (total + kDiscounts[source][order] * kUnit); }

struct Sources {
  const Stored* corpus;
  const Table* tables[2];  // the history, the text

  void mix(const uint32_t* ends, int count, Mixture& mixture) const {
    mixture.clear();
    uint64_t keys[kLongest];
    const int known = keys_of(ends, count, kLongest, keys);
    for (int order = 1; order <= known; ++order) {
      if (corpus && order <= kOrders[0]) mix_stored(keys[order - 1], order, mixture);
      for (int source = 1; source < kSources; ++source)
        if (tables[source - 1] && order <= kOrders[source]) mix_table(source, keys[order - 1], order, mixture);
    }
  }

 private:
  void mix_stored(uint64_t key, int order, Mixture& mixture) const {
    const uint64_t* end = corpus->keys + corpus->count;
    const uint64_t* found = std::lower_bound(corpus->keys, end, key);
    if (found == end || *found != key) return;
    const int64_t place = found - corpus->keys;
    if (corpus->totals[place] == 0) return;
    const double total = corpus->totals[place], share = share_of(0, order, total);
    mixture.scale(share);
    for (uint32_t i = corpus->starts[place]; i < corpus->starts[place + 1]; ++i)
      mixture.add(corpus->tokens[i], share / total * corpus->weights[i], 0, order);
  }

  void mix_table(int source, uint64_t key, int order, Mixture& mixture) const {
    const auto& contexts = tables[source - 1]->contexts;
    const auto found = contexts.find(key);
    if (found == contexts.end() || found->second.total == 0) return;
    const double total = static_cast<double>(found->second.total), share = share_of(source, order, total);
    mixture.scale(share);
    for (const Follower& follower : found->second.followers)
      mixture.add(follower.token, share / total * follower.weight, source, order);
  }
};

struct Waiting {
  double chance;
  int64_t number;
  int parent, depth, kind, known;
  uint32_t ends[kLongest];  // the last tokens up to this one

  bool operator<(const Waiting& other) const {  // the top of a queue is its largest
    return chance != other.chance ? chance < other.chance : number > other.number;
  }
};

int class_of(const Candidate& candidate) {
  const int bucket = static_cast<int>(std::upper_bound(kEdges, kEdges + kBuckets - 1, candidate.chance) - kEdges);
  return (candidate.source * kGroups + std::min(candidate.order, kGroups) - 1) * kBuckets + bucket;
}

struct Limits {
  int nodes, depth, width;
  double least;
};

class Tree {
 public:
  Tree(const Sources& sources, const double* rates, const Limits& limits)
      : sources_(sources), rates_(rates), limits_(limits) {}

  int grow(const uint32_t* context, int count, uint32_t* tokens, int32_t* parents, int32_t* classes) {
    Waiting root{};
    root.chance = 1.0;
    root.known = std::min(count, kLongest);
    std::copy(context + count - root.known, context + count, root.ends);
    expand(root, -1);
    int nodes = 0;
    while (!waiting_.empty() && nodes < limits_.nodes) {
      const Waiting next = waiting_.top();
      waiting_.pop();
      tokens[nodes] = next.ends[next.known - 1];
      parents[nodes] = next.parent;
      classes[nodes] = next.kind;
      expand(next, nodes++);
    }
    return nodes;
  }

 private:
  void expand(const Waiting& node, int row) {
    if (node.depth >= limits_.depth) return;
    sources_.mix(node.ends, node.known, mixture_);
    for (const Candidate& candidate : mixture_.best(static_cast<size_t>(limits_.width))) {
      const int kind = class_of(candidate);
      const double reached = node.chance * std::min(rates_[kind], kMostRate);
      if (!(reached >= limits_.least)) continue;
      Waiting child{};
      child.chance = reached;
      child.number = ++numbers_;
      child.parent = row;
      child.depth = node.depth + 1;
      child.kind = kind;
      const int kept = std::min(node.known, kLongest - 1);
      std::copy(node.ends + node.known - kept, node.ends + node.known, child.ends);
      child.ends[kept] = candidate.token;
      child.known = kept + 1;
      waiting_.push(child);
    }
  }

  const Sources& sources_;
  const double* rates_;
  const Limits limits_;
  Mixture mixture_;
  std::priority_queue<Waiting> waiting_;
  int64_t numbers_ = 0;
};

}  // namespace

// A negative result, or a null pointer, means that there was no memory.

DSPARK_EXPORT void* dspark_phrases_new(int32_t orders, int64_t most) {
  return new (std::nothrow) Table{std::min(std::max(orders, 1), kLongest), static_cast<size_t>(std::max<int64_t>(most, 0)), 0, {}};
}

DSPARK_EXPORT void dspark_phrases_free(void* table) { delete static_cast<Table*>(table); }

DSPARK_EXPORT int64_t dspark_phrases_contexts(const void* table) {
  return static_cast<int64_t>(static_cast<const Table*>(table)->contexts.size());
}

DSPARK_EXPORT int64_t dspark_phrases_followers(const void* table) {
  int64_t sum = 0;
  for (const auto& entry : static_cast<const Table*>(table)->contexts) sum += static_cast<int64_t>(entry.second.followers.size());
  return sum;
}

DSPARK_EXPORT int32_t dspark_phrases_add(void* table, const uint32_t* tokens, int32_t count, const uint32_t* next,
                                         const uint32_t* weights, int32_t followers) {
  try {
    static_cast<Table*>(table)->add(tokens, count, next, weights, followers);
    return 0;
  } catch (...) {
    return -1;
  }
}

DSPARK_EXPORT int32_t dspark_phrases_add_text(void* table, const uint32_t* tokens, int64_t count) {
  try {
    Table& phrases = *static_cast<Table*>(table);
    const uint32_t weight = static_cast<uint32_t>(kUnit);
    for (int64_t place = 1; place < count; ++place) {
      const int known = static_cast<int>(std::min<int64_t>(place, phrases.orders));
      phrases.add(tokens + place - known, known, tokens + place, &weight, 1);
    }
    return 0;
  } catch (...) {
    return -1;
  }
}

// Contexts in no order: key, total and number of followers of each, then all followers, context by context.
DSPARK_EXPORT void dspark_phrases_dump(const void* table, uint64_t* keys, int64_t* totals, int64_t* counts, int64_t* tokens,
                                       int64_t* weights) {
  for (const auto& entry : static_cast<const Table*>(table)->contexts) {
    *keys++ = entry.first;
    *totals++ = static_cast<int64_t>(entry.second.total);
    *counts++ = static_cast<int64_t>(entry.second.followers.size());
    for (const Follower& follower : entry.second.followers) {
      *tokens++ = follower.token;
      *weights++ = follower.weight;
    }
  }
}

DSPARK_EXPORT int32_t dspark_phrases_load(void* table, const uint64_t* keys, const uint32_t* starts, const uint32_t* totals,
                                          const uint32_t* tokens, const uint16_t* weights, int64_t count) {
  try {
    Table& phrases = *static_cast<Table*>(table);
    for (int64_t i = 0; i < count; ++i) {
      if (phrases.most != 0 && phrases.contexts.size() >= phrases.most) return 0;
      const auto made = phrases.contexts.try_emplace(keys[i]);
      if (!made.second) continue;
      Context& context = made.first->second;
      context.total = totals[i];
      context.clock = phrases.clock;
      for (uint32_t j = starts[i]; j < starts[i + 1]; ++j) context.followers.push_back({tokens[j], weights[j]});
    }
    return 0;
  } catch (...) {
    return -1;
  }
}

// A store that lies in the caller's arrays, which must outlive it.
DSPARK_EXPORT void* dspark_phrases_stored(const uint64_t* keys, const uint32_t* starts, const uint32_t* totals,
                                          const uint32_t* tokens, const uint16_t* weights, int64_t count) {
  return new (std::nothrow) Stored{keys, starts, totals, tokens, weights, count};
}

DSPARK_EXPORT void dspark_phrases_free_stored(void* stored) { delete static_cast<Stored*>(stored); }

// Nodes of the tree behind the `count` tokens of `context`, the last of which is the anchor. The outputs have room for
// `nodes` numbers each; `rates` has one for every class. Any source may be null.
DSPARK_EXPORT int32_t dspark_phrases_grow(const void* corpus, const void* history, const void* text, const double* rates,
                                          const uint32_t* context, int32_t count, int32_t nodes, int32_t depth, int32_t width,
                                          double least, uint32_t* tokens, int32_t* parents, int32_t* classes) {
  try {
    const Sources sources{static_cast<const Stored*>(corpus),
                          {static_cast<const Table*>(history), static_cast<const Table*>(text)}};
    return Tree(sources, rates, {nodes, depth, width, least}).grow(context, count, tokens, parents, classes);
  } catch (...) {
    return -1;
  }
}
