// Forward attention for sm_90a with TMA and wgmma: O = softmax(S) V, S = scale Q K^T, and LSE, by online softmax.
//
// A thread block works on tasks, tiles of TILE.rows queries of one head. Warpgroup 0 produces: one thread chooses the
// tasks and issues the copies of their Q, K and V tiles, ahead of the others also from one task to the next. Each other
// warpgroup owns 64 rows and keeps its part of S, P and O in registers. Within a warpgroup the products of the next
// scores S_j = Q K_j^T and of O += P_{j-1} V_{j-1} run while the softmax of S_j waits for the first of them alone;
// between warpgroups one's softmax runs under the other's products.
//
// The tiles of keys of all tasks are one stream: the first scores of a task are issued before the last output of the
// task before, whose O is written under the task's second scores.
#include "barrier.cuh"
#include "copy.cuh"
#include "dropout.cuh"
#include "list.cuh"
#include "mask.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Head dimensions in whole panels of 64 columns; columns beyond the tensors' are zeros.
constexpr int D = round_up(SPEC.head_dim, 64), DV = round_up(SPEC.head_dim_v, 64);
constexpr int GROUPS = TILE.warps / 4 - 1;                     // warpgroups that compute
constexpr int N = TILE.cols / 8;                               // accumulator tiles across S
constexpr int N_OUT = DV / 8;                                  // and across O
constexpr int Q_PANEL = 64 * 128, KV_PANEL = TILE.cols * 128;  // bytes of 64 columns
constexpr int Q_BYTES = D / 64 * Q_PANEL, K_BYTES = D / 64 * KV_PANEL, V_BYTES = DV / 64 * KV_PANEL;
constexpr int O_BYTES = 16 * DV * 2;  // of one warp's rows
constexpr int TASK_BYTES = SPEC.packed ? 32 : 16;
constexpr int PRODUCER_REGISTERS = GROUPS == 3 ? 32 : 24, MATH_REGISTERS = GROUPS == 3 ? 160 : 240;
static_assert(TILE.q_slots >= GROUPS && TILE.q_slots <= 2 * GROUPS);
static_assert(TILE.rows == 64 * GROUPS && TILE.cols % 16 == 0);
static_assert(PRODUCER_REGISTERS + GROUPS * MATH_REGISTERS <= (GROUPS + 1) * LAUNCH_REGISTERS);

// Whether the tanh of a tile that no mask cuts joins its exponentials: where nothing else is added to the scores, and
// registers suffice.
constexpr bool JOINS_TANH = SPEC.softcap && !SPEC.alibi && DV <= 128;
// Whether dropout follows each exponential at once, so that its random numbers are drawn under the next ones, and not
// after them all.
constexpr bool DROPS_AT_ONCE = SPEC.dropout && !SPEC.softcap && !SPEC.alibi && DV == 128;
// Whether registers suffice to keep, from tile to tile, what the counters of its random numbers have in common.
constexpr bool KEEPS_COUNTERS = SPEC.dropout && !(SPEC.softcap && SPEC.alibi);
// How exponentials with softcap come by the tanh of a tile. Where one way is out of its range, a later one is taken.
enum class Tanh {
    SERIES,  // joined, by a polynomial: scores far below the cap
    SHARED,  // joined, with one reciprocal for four neighbours
    BEFORE,  // before them, each score by itself: any cap and mask
    DONE     // they are computed again, with another m
};
constexpr int MOST_RELUCTANT = 31;  // then the series is tried in one tile of 32
// How far (in log2) scores may grow past m before m follows: P stays below 2^8.
constexpr float RESCALE_THRESHOLD = 8.0f;
// In the steady state nobody looks for the row maximum: m stays, and the row sums tell whether P is in range. P goes to
// a second set of registers, which leaves S for the case that it is not; or, where registers do not suffice for that,
// to the place of S, which is then computed again.
constexpr bool IN_PLACE = TILE.p_sets == 1;
static_assert(!IN_PLACE || !(SPEC.softcap || SPEC.alibi || SPEC.dropout));
// The largest sum of a lane's part of a row of P that counts as in range: of float16, or of the exponents that bfloat16
// shares with float32, with room for V.
constexpr float LARGEST_SUM = IN_PLACE && SPEC.dtype == Dtype::bfloat16 ? 0x1p30f : 0x1p12f;

// Where everything lies in shared memory. Q has slots of 64 rows, the part of one warpgroup, each with the task it
// belongs to; K and V have TILE.stages stages; O of each warp passes through a buffer of its own if it is staged.
struct Layout {
    unsigned int start;

    __device__ __forceinline__ unsigned int Q(int slot) const { return start + slot * Q_BYTES; }
    __device__ __forceinline__ unsigned int K(int stage) const { return Q(TILE.q_slots) + stage * K_BYTES; }
    __device__ __forceinline__ unsigned int V(int stage) const { return K(TILE.stages) + stage * V_BYTES; }
    __device__ __forceinline__ unsigned int O(int warp) const { return V(TILE.stages) + warp * O_BYTES; }
    __device__ __forceinline__ unsigned int task(int slot) const {
        return O(TILE.staged ? 4 * GROUPS : 0) + TASK_BYTES * slot;
    }
    __device__ __forceinline__ unsigned int Q_full(int slot) const { return task(TILE.q_slots) + 16 * slot; }
    __device__ __forceinline__ unsigned int Q_empty(int slot) const { return Q_full(slot) + 8; }
    __device__ __forceinline__ unsigned int K_full(int stage) const { return Q_full(TILE.q_slots) + 32 * stage; }
    __device__ __forceinline__ unsigned int K_empty(int stage) const { return K_full(stage) + 8; }
    __device__ __forceinline__ unsigned int V_full(int stage) const { return K_full(stage) + 16; }
    __device__ __forceinline__ unsigned int V_empty(int stage) const { return K_full(stage) + 24; }
    // Packed: the next task, for the threads that load V and Q.
    __device__ __forceinline__ Mail mail() const {
        return Mail{K_full(TILE.stages), K_full(TILE.stages) + 8, K_full(TILE.stages) + 16};
    }
};

// The slot of a warpgroup's part of Q of this block's task number `count`, and the parity of its barriers' phase. Each
// slot belongs to one warpgroup, the first warpgroups have two in turn: who waits for a phase has seen the one before.
constexpr int SECOND_SLOTS = TILE.q_slots - GROUPS;
struct Slot {
    int index;
    unsigned int parity;

    __device__ __forceinline__ Slot(int count, int warpgroup)
        : index(warpgroup + (warpgroup < SECOND_SLOTS ? count % 2 * GROUPS : 0)),
          parity((warpgroup < SECOND_SLOTS ? count / 2 : count) & 1) {}
};

// A tile of queries of one head. A packed sequence's rows are counted as its tensor map counts them, so that its q_len
// is RAGGED for all: what else differs between tasks would take more registers.
struct Task {
    int q_first;  // its first row; NONE after the last task
    int head;
    int index;  // of the sequence
    // Packed:
    int q_start, kv_start, kv_len;
    int shift;  // the number of the sequence's first row

    // Its first row, counted as the sequence's own.
    __device__ __forceinline__ int row_in_sequence() const { return q_first - (SPEC.packed ? shift : 0); }

    __device__ __forceinline__ Sequence sequence(const Params& p) const {
        if constexpr (SPEC.packed) return Sequence{index, 0, q_start, kv_start, RAGGED, kv_len};
        return Sequence{index, index, 0, 0, p.q_len, p.kv_len};
    }
};

__device__ __forceinline__ void store_task(unsigned int task_smem, const Task& task) {
    store_shared(task_smem, task.q_first, task.head, task.index, SPEC.packed ? task.kv_len : 0);
    if constexpr (SPEC.packed) store_shared(task_smem + 16, task.q_start, task.shift, 0, 0);
}

// The task, without the place of its keys.
__device__ __forceinline__ Task load_task(unsigned int task_smem) {
    const bool leader = threadIdx.x % 32 == 0;  // the lane that gives the slot back
    unsigned int word[4] = {};
    if (leader) load_shared(word, task_smem);
    auto shared = [](unsigned int x) { return static_cast<int>(__shfl_sync(0xFFFFFFFF, x, 0)); };
    Task task;
    task.q_first = shared(word[0]);
    task.head = shared(word[1]);
    task.index = shared(word[2]);
    if constexpr (SPEC.packed) {
        task.kv_len = shared(word[3]);
        if (leader) load_shared(word, task_smem + 16);
        task.q_start = shared(word[0]);
        task.shift = shared(word[1]);
    }
    return task;
}

// The tiles of keys of a task. Where its queries have no keys it is one beyond the last: zeros, all masked.
__device__ __forceinline__ TileRange tiles_of_task(const Band& band, int q_first, int q_len) {
    const TileRange tiles = band.kv_tiles(q_first, min(q_first + TILE.rows, q_len) - 1);
    const int beyond = ceil_div(band.kv_len, TILE.cols);
    return tiles.first < tiles.last ? tiles : TileRange{beyond, beyond + 1};
}

// The tile of keys that is worked on at turn `turn`, a number of `tiles`. With ALiBi the first is that on the diagonal,
// or under a right bound the last, and it goes back from there to tiles.first, then on behind the diagonal: the largest
// scores come early, so that m can stay.
__device__ __forceinline__ int tile_of_turn(const Band& band, const TileRange& tiles, int q_first, int turn) {
    if constexpr (!SPEC.alibi) return turn;
    if constexpr (SPEC.bounded_right) return tiles.first + tiles.last - 1 - turn;
    const int diagonal = min(max((q_first + TILE.rows - 1 + band.offset) / TILE.cols, tiles.first), tiles.last - 1);
    return turn <= diagonal ? tiles.first + diagonal - turn : turn;
}

// Whether a mask leaves some rows of a task a tile of keys less than others: where the first rows of two warpgroups lie
// that far apart.
constexpr bool TRIMS = (SPEC.bounded_left || SPEC.bounded_right) && !SPEC.alibi && TILE.rows - 64 >= TILE.cols;

// The tiles that 64 rows need: at either end up to one less than all. (Not fewer: in the step from task to task V of a
// tile left out is given back last, when the producer may already wait for it.)
__device__ __forceinline__ TileRange tiles_of_rows(const Band& band, const TileRange& all, int q_first) {
    if constexpr (!TRIMS) return all;
    const TileRange own = band.kv_tiles(q_first, q_first + 63);
    const TileRange some{max(all.first, min(own.first, all.first + 1)), min(all.last, max(own.last, all.last - 1))};
    return own.first < own.last && some.first < some.last ? some : all;
}

// Whether the tiles of a head differ in their length: under a mask, but not in a window that is narrow.
__device__ __forceinline__ bool uneven(const Params& p) {
    if constexpr (SPEC.bounded_left && SPEC.bounded_right) return p.left + p.right >= p.kv_len / NARROW;
    return SPEC.bounded_left || SPEC.bounded_right;
}

// The tasks of this thread block, in order: `use(task, tickets)`.
//
// Where the tiles of a head differ, either there is a block for each, the longest first; or, with a smaller
// grid, they are worked on in pairs: the last of a head with its first, the one before with the second and so on, so
// that all pairs have as much to do. (Of an odd number of tiles the last has no partner, and is as long as the pairs.)
// A block's place moves on from round to round, since what is left of differences has the period of a head. Query heads
// that share one of K and V do not follow each other, or many blocks would read the same tile at the same time.
//
// Packed sequences' tasks are listed, the longest first, and a block that is done takes the next.
template <bool LEADER, typename Use>
__device__ __forceinline__ void for_each_task(const Params& p, const Layout& smem, Use use) {
    if constexpr (SPEC.packed) {
        for_each_listed<LEADER, false>(p, smem.mail(), p.heads, [&](const Work& work, Tickets& tickets) {
            const Sequence& s = work.sequence;
            const int shift = RAGGED - s.q_len;
            const Task task{
                shift + work.tile * TILE.rows, work.head, s.index, s.q_start - shift, s.kv_start, s.kv_len, shift};
            use(task, tickets);
        });
        return;
    }
    Tickets none{p, NONE};
    const int heads = p.heads * p.batch, pairs = ceil_div(p.q_tiles, 2);
    const unsigned int kv_heads = p.heads / p.group;
    const bool paired = uneven(p) && gridDim.x < p.q_tiles * heads;
    const int items = (paired ? pairs : p.q_tiles) * heads;
    for (int round = 0; round < ceil_div(items, gridDim.x); ++round) {
        const int item = round * gridDim.x + (blockIdx.x + round) % gridDim.x;
        if (item >= items) break;
        for (int partner = 0; partner < (paired ? 2 : 1); ++partner) {
            Task task;
            if (paired) {
                const int head = item / pairs, pair = item - head * pairs;
                const int tile = partner == 0 ? p.q_tiles - 1 - pair : pair - p.q_tiles % 2;
                if (tile < 0) continue;
                task.index = head / p.heads;
                const unsigned int turn = head - task.index * p.heads;
                task.head = turn % kv_heads * p.group + turn / kv_heads;
                task.q_first = tile * TILE.rows;
            } else {
                const Work work = find_work<TILE.rows, false>(p, item, p.q_tiles, p.heads);
                task = Task{work.tile * TILE.rows, work.head, work.sequence.index};
            }
            use(task, none);
        }
    }
}

// One thread: the copies of all tasks, in the order the consumers need them: K one tile before V, and Q as soon as it
// has a slot. Where tasks are listed, which takes registers, there are three threads, one for the copies of each; that
// of K leads.
template <bool QUERIES, bool KEYS, bool VALUES>
__device__ __forceinline__ void produce(const Params& p, const TensorMap& Q_map, const TensorMap& K_map,
                                        const TensorMap& V_map, const Layout& smem) {
    int count = 0;  // of tasks
    Ring<> k_ring, v_ring;
    int v_row = NONE, v_head = 0, v_place = 0;  // the tile of V whose turn is next

    auto load_Q = [&](const Task& task, int warpgroup) {
        const auto [slot, parity] = Slot(count, warpgroup);
        barrier_wait(smem.Q_empty(slot), parity ^ 1);
        store_task(smem.task(slot), task);
        if (task.q_first == NONE) {
            barrier_arrive(smem.Q_full(slot));
        } else {
            barrier_expect(smem.Q_full(slot), Q_BYTES);
            load_panels<SPEC.head_dim, Q_PANEL>(smem.Q(slot), Q_map, smem.Q_full(slot),
                                                task.sequence(p).q_row(task.q_first + 64 * warpgroup), task.head,
                                                task.sequence(p).q_place(), EVICT_FIRST);
        }
    };
    auto load_K = [&](int row, int head, int place) {
        const int stage = k_ring.stage;
        barrier_wait(smem.K_empty(stage), k_ring.parity ^ 1);
        barrier_expect(smem.K_full(stage), K_BYTES);
        load_panels<SPEC.head_dim, KV_PANEL>(smem.K(stage), K_map, smem.K_full(stage), row, head, place, EVICT_LAST);
        k_ring.advance();
    };
    auto load_V = [&] {
        if (v_row == NONE) return;
        const int stage = v_ring.stage;
        barrier_wait(smem.V_empty(stage), v_ring.parity ^ 1);
        barrier_expect(smem.V_full(stage), V_BYTES);
        load_panels<SPEC.head_dim_v, KV_PANEL>(smem.V(stage), V_map, smem.V_full(stage), v_row, v_head, v_place,
                                               EVICT_LAST);
        v_ring.advance();
    };

    // Warpgroups with a second slot get their Q before the last V of the task before, the others after its last scores.
    for_each_task<KEYS>(p, smem, [&](const Task& task, Tickets& tickets) {
        const Sequence sequence = task.sequence(p);
        const Band band(p, sequence);
        const TileRange tiles = KEYS || VALUES ? tiles_of_task(band, task.q_first, sequence.q_len) : TileRange{0, 1};
        for (int tile = tiles.first; tile < tiles.last; ++tile) {
            if (QUERIES && tile == tiles.first) {
                for (int warpgroup = 0; warpgroup < SECOND_SLOTS; ++warpgroup) load_Q(task, warpgroup);
            }
            const int kv_row = sequence.kv_row(tile_of_turn(band, tiles, task.q_first, tile) * TILE.cols);
            const int kv_head = task.head / p.group;
            if (SPEC.packed && KEYS && tile + 1 == tiles.last) tickets.take();  // on its way while this loads
            if constexpr (KEYS) load_K(kv_row, kv_head, sequence.kv_place());
            if constexpr (VALUES) {
                if constexpr (KEYS) load_V();
                v_row = kv_row, v_head = kv_head, v_place = sequence.kv_place();
                if constexpr (!KEYS) load_V();
            }
            if (QUERIES && tile == tiles.first) {
                for (int warpgroup = SECOND_SLOTS; warpgroup < GROUPS; ++warpgroup) load_Q(task, warpgroup);
            }
        }
        ++count;
    });
    if constexpr (KEYS && VALUES) load_V();
    if constexpr (QUERIES) {
        for (int warpgroup = 0; warpgroup < GROUPS; ++warpgroup) load_Q(Task{NONE}, warpgroup);
    }
}

// What ALiBi adds to a lane's exponents of a tile, -slope |distance|, in log2. Where all keys are behind their queries,
// or all ahead, that is linear in the key; a tile that the diagonal crosses is taken as one behind it, and mirror_slope
// makes up for the keys ahead. Keys are counted from the middle of the tile, which halves the largest rounding.
struct Slope {
    static constexpr int MIDDLE = TILE.cols / 16 * 8;

    float slope;     // of the head
    float slant;     // from one key to the next: `slope` behind the diagonal, its negative ahead
    float distance;  // how far the lane's first query is behind the key in the middle

    __device__ __forceinline__ void enter(float first_distance, bool ahead) {
        slant = ahead ? -slope : slope;
        distance = first_distance - MIDDLE;
    }

    // `x` and what the query in row half `half` has for the key in the middle, and what rounding left of that sum; and
    // what accumulator tile n adds to it.
    __device__ __forceinline__ float row(int half, float x, float& rest) const {
        const float d = distance + 8 * half, product = __fmul_rn(-slant, d), sum = product + x, added = sum - product;
        rest = fmaf(-slant, d, -product) + (product - (sum - added)) + (x - added);
        return sum;
    }
    __device__ __forceinline__ float further(float row, int n, int r) const {
        return fmaf(slant, 8 * n + r % 2 - MIDDLE, row);
    }
};

// tanh x = x (a + b x^2 + c x^4) up to |x| = LIMIT, to an absolute error of 1.7e-7 (the minimax polynomial), for x =
// factor S and times `cap`, as a polynomial in v = S^2 - end, whose sign tells whether S is within the limit.
struct TanhSeries {
    static constexpr float LIMIT = 0.3f, a = 0.99999601f, b = -0.33297480f, c = 0.12522591f;
    float end, c0, c1, c2;

    __device__ __forceinline__ TanhSeries(float factor, float cap) {
        constexpr float SQUARE = LIMIT * LIMIT;
        const float unit = factor * factor;
        end = SQUARE / unit;
        c0 = cap * factor * (a + SQUARE * (b + SQUARE * c));
        c1 = cap * factor * unit * (b + 2.0f * SQUARE * c);
        c2 = cap * factor * unit * unit * c;
    }

    // Whether the factor leaves the coefficients, and the square of LIMIT / factor, in the range of float32.
    __device__ __forceinline__ static bool serves(float factor) {
        return fabsf(factor) > 0x1p-20f && fabsf(factor) < 0x1p20f;
    }
};

// The state of the online softmax of this lane's two rows. It takes S as the product gives it, with softcap what stands
// for the tanh (tanh_of_tile), and the factor of the exponent joins the subtraction of m.
//
// A step is right whatever point m the exponentials refer to, as long as P stays in range. So m need not follow the row
// maximum, and O is rarely rescaled.
struct Softmax {
    float m[2] = {MINUS_INFINITY, MINUS_INFINITY};  // the point exponentials refer to, in the units of S, or log2
    float l[2] = {0.0f, 0.0f};                      // row sums of P, this lane's columns
    float factor;                                   // from the units of S to log2
    Slope slope;

    // From the units of m to log2: with ALiBi it is in log2.
    __device__ __forceinline__ float unit() const { return SPEC.alibi ? 1.0f : factor; }

    // A score in the units of m.
    __device__ __forceinline__ float score(const float (&S)[N][4], int n, int r) const {
        float rest;
        return SPEC.alibi ? fmaf(S[n][r], factor, slope.further(slope.row(r / 2, 0.0f, rest), n, r)) : S[n][r];
    }

    // For other rows; the factor stays.
    __device__ __forceinline__ void restart() {
        m[0] = m[1] = MINUS_INFINITY;
        l[0] = l[1] = 0.0f;
    }

    // Move m to the row maximum if for some row of the warp it is `threshold` (in log2) below. Then O must be
    // multiplied by `rescale`.
    __device__ __forceinline__ bool follow(const float (&S)[N][4], float threshold, float (&rescale)[2]) {
        float largest[2];
        bool grown = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = m[half];
#pragma unroll
            for (int n = 0; n < N; ++n) x = fmaxf(x, fmaxf(score(S, n, 2 * half), score(S, n, 2 * half + 1)));
            x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
            largest[half] = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
            grown |= (largest[half] - m[half]) * unit() > threshold;
        }
        const bool moved = __any_sync(0xFFFFFFFF, grown);
        if (moved) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float reference = largest[half] == MINUS_INFINITY ? 0.0f : largest[half];
                rescale[half] = exp2_approximate((m[half] - reference) * unit());
                l[half] *= rescale[half];
                m[half] = largest[half];
            }
        }
        return moved;
    }

    // P = 2^(factor S - m) and this lane's row sums, four neighbours at a time: `use(n, p)` takes accumulator tile n.
    template <typename Use>
    __device__ __forceinline__ void exponentials(const float (&S)[N][4], float (&sum)[2], Use use) {
        // It looks new, or the compiler would keep what ALiBi adds to each element from one use to the next.
        if constexpr (SPEC.alibi) asm volatile("" : "+f"(slope.distance));
        float row[2], rest[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row[half] = m[half] == MINUS_INFINITY ? 0.0f : -m[half] * unit();
            if constexpr (SPEC.alibi) row[half] = slope.row(half, row[half], rest[half]);
            sum[half] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float p[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float term = SPEC.alibi ? slope.further(row[r / 2], n, r) : row[r / 2];
                p[r] = exp2_approximate(fmaf(S[n][r], factor, term));
                sum[r / 2] += p[r];
            }
            use(n, p);
        }
        // The rest is nothing to P in 16 bits, but something to LSE.
        if constexpr (SPEC.alibi) {
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[half] = fmaf(sum[half], rest[half] * LN_2, sum[half]);
        }
    }

    // The same from S as the product gives it, with softcap: P = 2^(cap tanh - cap - factor m), factor = 2 cap, by the
    // series. Whether it holds for all scores of the lane; if not, P and the sums are of no use. (NaN is beyond it.)
    template <typename Use>
    __device__ __forceinline__ bool series_exponentials(const float (&S)[N][4], const TanhSeries& series,
                                                        float (&sum)[2], Use use) {
        unsigned int within = 0x80000000;  // the sign that all v have in common
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float p[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float v = fmaf(S[n][r], S[n][r], -series.end);
                within &= __float_as_uint(v);
                const float slope = fmaf(fmaf(series.c2, v, series.c1), v, series.c0);
                p[r] = exp2_approximate(fmaf(S[n][r], slope, -factor * (m[r / 2] + 0.5f)));
                sum[r / 2] += p[r];
            }
            use(n, p);
        }
        return within != 0;
    }

    // The same for any score, where the cap is not large: P = 2^(-factor / (1 + 2^x) - factor m), x = tanh_factor S.
    // Four neighbours of a row share a reciprocal, that of the product of their 1 + 2^x. These are kept times 2^-30 and
    // end at 2^30, by the saturation of the instruction, so that the product stays in range. (NaN saturates to 0: it
    // becomes NaN of some neighbour, which is of the same row, as no mask cuts the tile.)
    template <typename Use>
    __device__ __forceinline__ void capped_exponentials(const float (&S)[N][4], float tanh_factor, float (&sum)[2],
                                                        Use use) {
        constexpr float SCALE = 0x1p-30f;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            float p[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float a[2][2];  // 2^-30 (1 + 2^x)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float power = exp2_approximate(tanh_factor * S[n + i / 2][2 * half + i % 2]);
                    a[i / 2][i % 2] = __saturatef(fmaf(power, SCALE, SCALE));
                }
                const float product[2] = {a[0][0] * a[0][1], a[1][0] * a[1][1]};
                const float quotient = -factor * SCALE * reciprocal_approximate(product[0] * product[1]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float others = quotient * product[1 - i / 2];
                    float& x = p[i / 2][2 * half + i % 2];
                    x = exp2_approximate(fmaf(others, a[i / 2][1 - i % 2], -factor * m[half]));
                    sum[half] += x;
                }
            }
            use(n, p[0]);
            use(n + 1, p[1]);
        }
    }

    // Whether exponentials with these sums are in range in every row of the warp, and all its lanes' are of use. (NaN
    // counts as out of range, and so does a row whose m is not known yet.)
    __device__ __forceinline__ bool in_range(const float (&sum)[2], bool of_use = true) const {
        const bool fits = of_use && sum[0] < LARGEST_SUM && sum[1] < LARGEST_SUM;
        return __all_sync(0xFFFFFFFF, fits && m[0] > MINUS_INFINITY && m[1] > MINUS_INFINITY);
    }

    __device__ __forceinline__ void add(const float (&sum)[2]) {
        l[0] += sum[0];
        l[1] += sum[1];
    }
};

// Softcap, but for its factor and shift, and, where it cuts the tile, the mask of a tile of scores of one warp.
__device__ __forceinline__ void finish_scores(float (&S)[N][4], const Scores& scores, const Band& band, bool cut,
                                              int q_first, int kv_first) {
    if constexpr (SPEC.softcap) tanh_of_tile<true>(S, scores.factor, scores.cap);
    if (!cut) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned int allowed = band.keys_of(q_first + lane / 4 + 8 * half, kv_first + lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                if (!(allowed >> (2 * n + u) & 1)) S[n][2 * half + u] = MINUS_INFINITY;
            }
        }
    }
}

// S = Q K^T  [64, cols], asynchronous.
__device__ __forceinline__ void issue_scores(float (&S)[N][4], unsigned int Q_smem, unsigned int K_smem) {
    // Q stays in place, so the compiler keeps the descriptors of all steps in uniform registers. Where these are too
    // many beside the rest, an address that looks new has them computed here each time, or those of the later panels.
    if constexpr (D > 128 || DV > 128 || SPEC.softcap || SPEC.alibi || (SPEC.dropout && SPEC.packed))
        asm volatile("" : "+r"(Q_smem));
    const unsigned long long Q = tile_descriptor(Q_smem, 16), K = tile_descriptor(K_smem, 16);
    if constexpr (DROPS_AT_ONCE) asm volatile("" : "+r"(Q_smem));
    const unsigned long long Q_later = tile_descriptor(Q_smem, 16);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const int in_panel = step % 4 * 2;  // 32 bytes
        wgmma_ss<K_MAJOR>(S, (step < 4 ? Q : Q_later) + step / 4 * (Q_PANEL / 16) + in_panel,
                          K + step / 4 * (KV_PANEL / 16) + in_panel, step > 0);
    }
    wgmma_commit();
}

// O += P V  [64, head_dim_v], asynchronous.
__device__ __forceinline__ void issue_output(float (&O)[N_OUT][4], unsigned int (&P)[N / 2][4], unsigned int V_smem,
                                             bool add) {
    const unsigned long long V = tile_descriptor(V_smem, KV_PANEL);
#pragma unroll
    for (int step = 0; step < TILE.cols / 16; ++step) wgmma_rs<MN_MAJOR>(O, P[step], V + step * 128, add || step > 0);
    wgmma_commit();
}

// LSE, if anybody wants it, of the 16 rows of one warp, from row `row` of the task on, and the factors of O: 1 / l, and
// what dropout multiplies by.
__device__ __forceinline__ void finish_softmax(const Params& p, const Task& task, int row, const Softmax& softmax,
                                               float sink, float (&scale)[2]) {
    const Sequence sequence = task.sequence(p);
    const int lane = threadIdx.x % 32, first = task.q_first + row;
    float* lse_gmem = statistic_rows(p.lse, sequence.batch, sequence.q_start + first, task.head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float lse, m = softmax.m[half] * softmax.unit();
        if constexpr (SPEC.softcap) m += halved_shift(p.softcap * UNIT);
        scale[half] = finish_row(m, row_sum(softmax.l[half]), sink, lse);
        if constexpr (SPEC.dropout) scale[half] *= p.dropout_scale;
        const int i = lane / 4 + 8 * half;
        if (p.lse.data != nullptr && lane % 4 == 0 && i < sequence.q_len - first) lse_gmem[i] = lse;
    }
}

// O / l of these rows. Staged, it goes through shared memory, in panels of 64 columns swizzled as TMA reads them; the
// copy is under way when this returns.
__device__ __forceinline__ void store_output(const Params& p, const TensorMap& O_map, const Layout& smem,
                                             const Task& task, int row, const float (&scale)[2],
                                             const float (&O)[N_OUT][4]) {
    const int first = task.q_first + row;
    const Sequence sequence = task.sequence(p);
    if constexpr (TILE.staged) {
        constexpr int PANEL = 16 * 128;
        const int lane = threadIdx.x % 32;
        const unsigned int O_smem = smem.O(threadIdx.x / 32 - 4);
        // Lane l gives row l % 8 of matrix l / 8, of two by two matrices of 8 rows and 8 columns, a chunk.
        const unsigned int lane_smem = O_smem + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
        if (lane == 0) bulk_wait_read();  // of the task before
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N_OUT; n += 2) {
            const unsigned int words[4] = {pack(O[n][0] * scale[0], O[n][1] * scale[0]),
                                           pack(O[n][2] * scale[1], O[n][3] * scale[1]),
                                           pack(O[n + 1][0] * scale[0], O[n + 1][1] * scale[0]),
                                           pack(O[n + 1][2] * scale[1], O[n + 1][3] * scale[1])};
            store_matrix_x4((lane_smem ^ n % 8 * 16) + n / 8 * PANEL, words);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            store_panels<SPEC.head_dim_v, PANEL>(O_map, O_smem, sequence.q_row(first), task.head, sequence.q_place());
            bulk_commit();
        }
    } else {
        Element* O_gmem = head_rows(p.out, sequence.batch, sequence.q_start + first, task.head);
        store_accumulators<SPEC.head_dim_v>(O_gmem, p.out.row_stride, sequence.q_len - first, 0, O, scale, false);
    }
}

// The warpgroups issue their products in turn, so that one's softmax runs under the products of the others. The turn is
// a named barrier of each warpgroup: it waits there, and the one before it arrives.
struct Turn {
    int warpgroup;

    __device__ __forceinline__ void start() const {
        if (TILE.turns && warpgroup == GROUPS - 1) pass();
    }

    __device__ __forceinline__ void take() const {
        if constexpr (TILE.turns) named_barrier_wait(1 + warpgroup, 256);
    }

    __device__ __forceinline__ void pass() const {
        if constexpr (TILE.turns) named_barrier_arrive(1 + (warpgroup + 1) % GROUPS, 256);
    }
};

// One warpgroup: 64 rows of every task.
__device__ __forceinline__ void attend(const Params& p, const TensorMap& O_map, const Layout& smem, int warpgroup) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 - 64;  // the warp's first row of a task
    auto band_of = [&](const Sequence& sequence) {
        Band band(p, sequence);
        // Rows beyond the sequence are zeros and are not stored: no need to mask them.
        band.q_len = SPEC.packed ? 2 * (RAGGED - 1) : RAGGED;
        return band;
    };
    Band band = band_of(Task{}.sequence(p));  // of the task; packed sequences have each their own
    int count = 0;                            // of tasks
    Slot q_slot(count, warpgroup);
    Ring<> ring;
    Scores scores(p, 0, 0, band.offset);
    Softmax softmax;
    softmax.factor = SPEC.softcap ? halved_factor(scores.cap) : scores.factor;
    const TanhSeries series(scores.factor, scores.cap);
    // The series is tried where the number of the tile has none of these bits: ever less often after it was of no use.
    int reluctance = 0;
    Task task;
    Dropout::Row counters;  // of the warp's rows of the task
    TileRange tiles;        // of keys that these rows of the task need
    int after;              // tiles that only the others need, behind those
    int tile;
    auto next_task = [&] {
        barrier_wait(smem.Q_full(q_slot.index), q_slot.parity);
        return load_task(smem.task(q_slot.index));
    };
    // Whether the task has rows for this warpgroup: the last tile of a head may not.
    auto has_rows = [&](const Task& task) { return task.q_first + 64 * warpgroup < task.sequence(p).q_len; };
    auto find_tiles = [&](const Task& task) {  // and how many the others need before them
        Band own = SPEC.packed ? band_of(task.sequence(p)) : band;
        // It looks new, or the compiler would keep the number of its tiles in registers, which are short.
        if constexpr (DROPS_AT_ONCE) asm volatile("" : "+r"(own.kv_len));
        const TileRange all = tiles_of_task(own, task.q_first, task.sequence(p).q_len);
        tiles = tiles_of_rows(own, all, task.q_first + 64 * warpgroup);
        after = all.last - tiles.last;
        return tiles.first - all.first;
    };
    auto begin = [&](const Task& next) {
        task = next;
        tile = tiles.first;
        if constexpr (SPEC.packed) band = band_of(task.sequence(p));
        scores = Scores(p, task.index, task.head, band.offset);
        softmax.restart();
        softmax.slope.slope = scores.slope;
        reluctance /= 2;
        if constexpr (KEEPS_COUNTERS) {
            counters = Dropout(p, task.index, task.head).own_row(task.row_in_sequence() + warp_row);
        }
    };
    const Turn turn{warpgroup};
    // Tiles of the stream that these rows do not need: the turn is passed on, the buffers are given back.
    auto pass_K = [&] {
        turn.take();
        turn.pass();
        barrier_wait(smem.K_full(ring.stage), ring.parity);
        if (lane == 0) barrier_arrive(smem.K_empty(ring.stage));
    };
    auto pass_V = [&](const Ring<>& ring) {
        barrier_wait(smem.V_full(ring.stage), ring.parity);
        if (lane == 0) barrier_arrive(smem.V_empty(ring.stage));
    };

    float O[N_OUT][4];
    float S[N][4];
    // P of every other tile of a task, counted from its last, and of those between; one set of registers for both if
    // TILE.p_sets is 1
    unsigned int P_even[N / 2][4], P_other[N / 2][4];
    auto& P_odd = TILE.p_sets == 2 ? P_other : P_even;
    float rescale[2], sum[2];
    auto in_place = [&](int n, const float (&x)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) S[n][r] = x[r];
    };
    // S is there: K is no longer needed, nor is Q after the last tile.
    auto release_scores = [&] {
        if (lane == 0) barrier_arrive(smem.K_empty(ring.stage));
        if (lane == 0 && tile + 1 == tiles.last) barrier_arrive(smem.Q_empty(q_slot.index));
    };
    auto kv_first = [&] { return tile_of_turn(band, tiles, task.q_first, tile) * TILE.cols; };
    auto drop = [&](unsigned int (&P)[N / 2][4]) {
        if constexpr (SPEC.dropout) {
            const Dropout dropout(p, task.index, task.head);
            if constexpr (!KEEPS_COUNTERS) counters = dropout.own_row(task.row_in_sequence() + warp_row);
            dropout.drop(P, counters, kv_first());
        }
    };
    auto is_cut = [&] { return band.cuts(task.q_first + warpgroup * 64, 64, kv_first(), TILE.cols); };
    auto finish = [&] {
        finish_scores(S, scores, band, is_cut(), task.q_first + warp_row, kv_first());
        if constexpr (SPEC.alibi) {
            const float distance = scores.distance(task.q_first + warp_row + lane / 4, kv_first() + lane % 4 * 2);
            const int behind = task.q_first + warp_row + band.offset - kv_first();  // the first query the first key
            const bool ahead = behind + 15 <= 0;                                    // all queries all keys
            softmax.slope.enter(distance, ahead);
            if (!ahead && behind < TILE.cols - 1) mirror_slope<-1>(S, scores.slope / softmax.factor, distance);
        }
    };
    auto pack_into = [&](unsigned int (&P)[N / 2][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n) pack_tile(P, n, S[n]);
        drop(P);
    };
    auto rescale_output = [&] {
#pragma unroll
        for (int n = 0; n < N_OUT; ++n) {
#pragma unroll
            for (int r = 0; r < 4; ++r) O[n][r] *= rescale[r / 2];
        }
    };

    turn.start();
    Task next = next_task();
    while (next.q_first != NONE) {
        const int before = find_tiles(next);
        const bool runs = has_rows(next);
        for (int left = runs ? before : before + tiles.last - tiles.first + after; left > 0; --left) {
            pass_K();
            pass_V(ring);
            ring.advance();
        }
        if (!runs) {
            if (lane == 0) barrier_arrive(smem.Q_empty(q_slot.index));
            q_slot = Slot(++count, warpgroup);
            next = next_task();
            continue;
        }

        // A run of tasks. P_first of its first:
        begin(next);
        barrier_wait(smem.K_full(ring.stage), ring.parity);
        turn.take();
        wgmma_fence();
        issue_scores(S, smem.Q(q_slot.index), smem.K(ring.stage));
        turn.pass();
        wgmma_wait<0>();
        pin(S);
        release_scores();
        finish();
        softmax.follow(S, 0.0f, rescale);
        softmax.exponentials(S, sum, in_place);
        softmax.add(sum);
        pack_into(P_even);

        Task finished = task;  // the task before, whose O is complete in its registers,
        bool pending = false;  // and not written yet,
        float scale[2];        // and its factors
        while (true) {
            // The step to the second tile of a task, and from its last tile to the first of the next task: which of
            // them may be there is not known, so this step can do both.
            const Ring<> previous = ring;
            const bool first = tile == tiles.first, crosses = tile + 1 == tiles.last;
            bool goes_on = true;
            int passed = 0;  // tiles between the two
            next = task;
            if (crosses) {
                passed = after;
                q_slot = Slot(++count, warpgroup);
                next = next_task();
                goes_on = next.q_first != NONE && has_rows(next);
                const int before = find_tiles(next);
                if (goes_on) passed += before;
            }
            ring.advance();
            if constexpr (TRIMS) {
                for (int i = 0; i < passed; ++i) {
                    pass_K();
                    ring.advance();
                }
            }
            if (goes_on) {
                barrier_wait(smem.K_full(ring.stage), ring.parity);
                turn.take();
            }
            wgmma_fence();
            issue_scores(S, smem.Q(q_slot.index), smem.K(ring.stage));  // of anything, if the run ends: nobody looks
            if (goes_on) turn.pass();
            if (first && pending) {
                store_output(p, O_map, smem, finished, warp_row, scale, O);
                pending = false;
            }
            if (crosses) {
                finished = task;
                pending = true;
                finish_softmax(p, finished, warp_row, softmax, scores.sink, scale);
                begin(next);
                tile = tiles.first - 1;  // not `else ++tile`: ptxas would take the tile for one that differs in a warp
            }
            ++tile;
            barrier_wait(smem.V_full(previous.stage), previous.parity);
            wgmma_fence();
            issue_output(O, P_even, smem.V(previous.stage), !first);
            wgmma_wait<1>();
            pin(S);
            bool moved = false;
            if (goes_on) {
                release_scores();
                finish();
                moved = softmax.follow(S, crosses ? 0.0f : RESCALE_THRESHOLD, rescale);
                softmax.exponentials(S, sum, in_place);
                softmax.add(sum);
            }
            wgmma_wait<0>();
            pin(O);
            pin(P_even);
            if (lane == 0) barrier_arrive(smem.V_empty(previous.stage));
            if constexpr (TRIMS) {
                Ring<> behind = previous;
                for (int i = 0; i < passed; ++i) {
                    behind.advance();
                    pass_V(behind);
                }
            }
            if (moved && !crosses) rescale_output();
            if (!goes_on) break;
            pack_into(P_even);

            // P_tile, while O += P_{tile - 1} V_{tile - 1}
            auto advance = [&](unsigned int (&P_previous)[N / 2][4], unsigned int (&P)[N / 2][4]) {
                const Ring<> before = ring;
                ring.advance();
                ++tile;
                barrier_wait(smem.K_full(ring.stage), ring.parity);
                turn.take();
                wgmma_fence();
                issue_scores(S, smem.Q(q_slot.index), smem.K(ring.stage));
                barrier_wait(smem.V_full(before.stage), before.parity);
                issue_output(O, P_previous, smem.V(before.stage), true);
                turn.pass();
                wgmma_wait<1>();
                pin(S);
                if constexpr (!IN_PLACE) release_scores();
                if constexpr (!JOINS_TANH) finish();
                Tanh way = Tanh::DONE;
                if (JOINS_TANH) {
                    const bool joins = scores.cap <= LARGE_CAP && !is_cut();
                    const bool tries = TanhSeries::serves(scores.factor) && (tile & reluctance) == 0;
                    way = !joins ? Tanh::BEFORE : tries ? Tanh::SERIES : Tanh::SHARED;
                }
                bool grown = false, fits = true;
                if constexpr (!IN_PLACE) {
                    // Again with another m where P is out of range; a loop, so that P is computed in one place. That it
                    // comes before the vote keeps it under the product: otherwise ptxas moves the wait before it.
#pragma unroll 1
                    while (true) {
                        auto use = [&](int n, const float (&x)[4]) { pack_tile(P, n, x); };
                        bool within = true;
                        if (way == Tanh::SERIES) {
                            within = softmax.series_exponentials(S, series, sum, use);
                        } else if (way == Tanh::SHARED) {
                            softmax.capped_exponentials(S, scores.factor * 2.0f * LOG2_E, sum, use);
                        } else {
                            if (way == Tanh::BEFORE) finish();
                            if constexpr (DROPS_AT_ONCE) {
                                const Dropout dropout(p, task.index, task.head);
                                uint4 counter;
                                softmax.exponentials(S, sum, [&](int n, const float (&x)[4]) {
                                    pack_tile(P, n, x);
                                    if (n % 4 == 3) dropout.drop_blocks(P, n / 4 * 2, counter, counters, kv_first());
                                });
                            } else {
                                softmax.exponentials(S, sum, use);
                            }
                        }
                        pin(P);
                        if (softmax.in_range(sum, within)) {
                            if (way == Tanh::SERIES) reluctance = 0;
                            break;
                        }
                        if (way == Tanh::SERIES && __any_sync(0xFFFFFFFF, !within)) {
                            reluctance = min(2 * reluctance + 1, MOST_RELUCTANT);
                            way = Tanh::SHARED;
                        } else if (way == Tanh::SERIES || way == Tanh::SHARED) {
                            way = Tanh::BEFORE;
                        } else {
                            const bool moved = softmax.follow(S, 0.0f, rescale);
                            grown |= moved;
                            if (!moved) break;
                            way = Tanh::DONE;
                        }
                    }
                    if constexpr (!DROPS_AT_ONCE) drop(P);
                } else {
                    softmax.exponentials(S, sum, in_place);
                    fits = named_barrier_all(1 + GROUPS + warpgroup, 128, softmax.in_range(sum));
                }
                wgmma_wait<0>();
                pin(O);
                pin(P_previous);
                if (lane == 0) barrier_arrive(smem.V_empty(before.stage));
                if constexpr (IN_PLACE) {
                    if (!fits) {  // the product takes the whole warpgroup, so it decided together
                        wgmma_fence();
                        issue_scores(S, smem.Q(q_slot.index), smem.K(ring.stage));
                        wgmma_wait<0>();
                        pin(S);
                        finish();
                        grown = softmax.follow(S, 0.0f, rescale);
                        softmax.exponentials(S, sum, in_place);
                    }
                    release_scores();
                }
                softmax.add(sum);
                if (grown) rescale_output();
                if constexpr (IN_PLACE) pack_into(P);
            };
            // The other tiles of the task: an even number of them, so that the last P is in P_even.
            const int steps = crosses ? 0 : tiles.last - 1 - tile;
            if constexpr (TILE.p_sets == 2) {
                if (steps % 2 == 0) {
#pragma unroll 1
                    for (int pair = 0; pair < steps / 2; ++pair) {
                        advance(P_even, P_odd);
                        advance(P_odd, P_even);
                    }
                }
            } else {
#pragma unroll 1
                for (int step = 0; step < steps; ++step) advance(P_even, P_even);
            }
        }
        store_output(p, O_map, smem, finished, warp_row, scale, O);
    }
    if (TILE.staged && lane == 0) bulk_wait_read();  // before this shared memory becomes another block's
}

KERNEL(forward_hopper, 1)(ARGUMENT(Params) p, ARGUMENT(TensorMap) Q_map, ARGUMENT(TensorMap) K_map,
                          ARGUMENT(TensorMap) V_map, ARGUMENT(TensorMap) O_map) {
    extern __shared__ __align__(1024) unsigned char smem_start[];
    const Layout smem{shared_address(smem_start)};
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < TILE.q_slots; ++slot) {
            barrier_init(smem.Q_full(slot), 1);
            barrier_init(smem.Q_empty(slot), 4);
        }
        for (int stage = 0; stage < TILE.stages; ++stage) {
            barrier_init(smem.K_full(stage), 1);
            barrier_init(smem.K_empty(stage), 4 * GROUPS);
            barrier_init(smem.V_full(stage), 1);
            barrier_init(smem.V_empty(stage), 4 * GROUPS);
        }
        if constexpr (SPEC.packed) {
            barrier_init(smem.mail().full, 1);
            barrier_init(smem.mail().empty, 2);
        }
        fence_barrier_init();
    }
    __syncthreads();

    // The shuffle tells the compiler that the number is uniform, and so are the descriptors computed from it.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        release_registers<PRODUCER_REGISTERS>();
        if constexpr (SPEC.packed) {
            if (threadIdx.x == 0) produce<false, true, false>(p, Q_map, K_map, V_map, smem);
            if (threadIdx.x == 32) produce<false, false, true>(p, Q_map, K_map, V_map, smem);
            if (threadIdx.x == 64) produce<true, false, false>(p, Q_map, K_map, V_map, smem);
        } else {
            if (threadIdx.x == 0) produce<true, true, true>(p, Q_map, K_map, V_map, smem);
        }
    } else {
        take_registers<MATH_REGISTERS>();
        attend(p, O_map, smem, warpgroup - 1);
    }
}
