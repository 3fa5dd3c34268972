// The tasks of packed sequences. Their lengths are known on the device alone, so a kernel of one thread block lists the
// tiles of one head, and the Hopper kernels take their tasks from that list.
#pragma once
#include "barrier.cuh"
#include "mask.cuh"

// What p.tasks holds: first their number in `tile`, then the tasks; and behind them list_tasks has some place.
struct alignas(16) Record {
    int index;  // of the sequence
    int tile;   // of the sequence's own rows
    int q_start, q_len, kv_start, kv_len;
    int unused[2];
};
constexpr int NONE = -1;

// Where the thread that takes a thread block's tasks tells the others which it is: two barriers and two words, a task's
// rank in the list and its head, in shared memory.
struct Mail {
    unsigned int full, empty, words;
};

// The numbers of this thread block's tasks, taken from a counter by one thread, the leader. The first is that of the
// block, except where tiles wait for each other (SPEC.deterministic): there it is taken too, so that all tasks before a
// taken one are being worked on by blocks that run, however few of the grid do.
struct Tickets {
    const Params& p;
    int number;

    __device__ __forceinline__ void start() {
        number = blockIdx.x;
        if constexpr (SPEC.deterministic) take();
    }

    __device__ __forceinline__ void take() {
        number = static_cast<int>(SPEC.deterministic ? 0 : gridDim.x) + atomicAdd(p.tickets, 1);
    }
};

// The listed tasks of this thread block, of each of `heads` heads, visit(work, tickets). The leader takes the next
// ticket in the visit, towards its end: a task that is taken early waits, maybe while others have nothing left to do.
// It tells the others; these are single threads, or whole warps (WARP).
template <bool LEADER, bool WARP, typename Visit>
__device__ __forceinline__ void for_each_listed(const Params& p, const Mail& mail, int heads, Visit visit) {
    const Record* records = reinterpret_cast<const Record*>(p.tasks);
    // The shuffle tells the compiler that a word is the same in the whole warp.
    auto same = [](int word) { return WARP ? __shfl_sync(0xFFFFFFFF, word, 0) : word; };
    unsigned int parity = 0;
    int head = 0;
    auto next_rank = [&](const Tickets& tickets) {
        int rank;
        if constexpr (LEADER) {
            const int tasks = records->tile, number = tickets.number;
            unsigned int own_head = 0;
            rank = number < tasks * heads ? rank_in_section(p, number, tasks, heads, own_head) : NONE;
            head = own_head;
            barrier_wait(mail.empty, parity ^ 1);
            store_shared_word(mail.words, rank);
            store_shared_word(mail.words + 4, head);
            barrier_arrive(mail.full);
        } else {
            barrier_wait(mail.full, parity);
            const bool reads = !WARP || threadIdx.x % 32 == 0;  // the lane that gives the words back
            rank = same(reads ? load_shared_word(mail.words) : 0);
            head = same(reads ? load_shared_word(mail.words + 4) : 0);
            if (reads) barrier_arrive(mail.empty);
        }
        parity ^= 1;
        return rank;
    };
    Tickets tickets{p, NONE};
    if constexpr (LEADER) tickets.start();
    int rank = next_rank(tickets);
#pragma unroll 1
    while (rank != NONE) {
        const Record record = records[1 + rank];
        const Sequence sequence{same(record.index), 0, same(record.q_start), same(record.kv_start), same(record.q_len),
                                same(record.kv_len)};
        visit(Work{sequence, head, same(record.tile), true}, tickets);
        rank = next_rank(tickets);
    }
}

// One thread block lists the tiles of queries (BY_KEYS: of keys): the sequence whose tiles visit the most of the other
// side first, so that the last tasks are short; and of a sequence the longest first, which under a right bound are the
// last queries and the first keys. A sequence's tiles stay together, because they read the same. (And tiles of keys in
// their order, which lets those wait for each other that SPEC.deterministic has wait.)
template <bool BY_KEYS>
__device__ __forceinline__ void list_tasks(const Params& p) {
    constexpr int ROWS = BY_KEYS ? TILE.cols : TILE.rows;
    const int tiles = BY_KEYS ? p.kv_tiles : p.q_tiles;
    Record* records = reinterpret_cast<Record*>(p.tasks);
    int* starts = reinterpret_cast<int*>(records + 1 + tiles);  // of each sequence in the list
    auto tiles_of_sequence = [](const Sequence& s) { return ceil_div(BY_KEYS ? s.kv_len : s.q_len, ROWS); };

    // A counting sort of the sequences: a place for each number of tiles visited, the largest first; several numbers
    // share one where there are too many.
    __shared__ int places[THREADS];
    const int most = BY_KEYS ? p.q_len / TILE.rows + 1 : p.kv_len / TILE.cols + 1;
    int shift = 0;
    while (most >> shift >= THREADS) ++shift;
    auto place = [&](const Sequence& s) {
        const Band band(p, s);
        auto visited = [&](int tile) {
            const int first = tile * ROWS, last = min(first + ROWS, BY_KEYS ? s.kv_len : s.q_len) - 1;
            const TileRange range = BY_KEYS ? band.q_tiles(first, last) : band.kv_tiles(first, last);
            return range.last - range.first;
        };
        return &places[THREADS - 1 - (max(visited(0), visited(tiles_of_sequence(s) - 1)) >> shift)];
    };
    places[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i <= p.batch; i += THREADS) {
        const Sequence s = packed_sequence<BY_KEYS>(p, i);
        if (tiles_of_sequence(s) > 0) atomicAdd(place(s), tiles_of_sequence(s));
    }
    // How many tasks come before those of a place: sums that double their reach from step to step.
    __syncthreads();
    const int own = places[threadIdx.x];
    int sum = own;
    for (int reach = 1; reach < THREADS; reach *= 2) {
        const int before = threadIdx.x >= reach ? places[threadIdx.x - reach] : 0;
        __syncthreads();
        places[threadIdx.x] = sum += before;
        __syncthreads();
    }
    if (threadIdx.x == THREADS - 1) records[0] = Record{0, sum, 0, 0, 0, 0, {}};
    places[threadIdx.x] = sum - own;
    __syncthreads();
    for (int i = threadIdx.x; i <= p.batch; i += THREADS) {
        const Sequence s = packed_sequence<BY_KEYS>(p, i);
        if (tiles_of_sequence(s) > 0) starts[i] = atomicAdd(place(s), tiles_of_sequence(s));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tiles; i += THREADS) {
        const Work work = find_work<ROWS, BY_KEYS>(p, i, tiles, 1);
        if (!work.exists) continue;
        const Sequence& s = work.sequence;
        const int place = !BY_KEYS && SPEC.bounded_right ? tiles_of_sequence(s) - 1 - work.tile : work.tile;
        records[1 + starts[s.index] + place] = Record{s.index, work.tile, s.q_start, s.q_len, s.kv_start, s.kv_len, {}};
    }
}
