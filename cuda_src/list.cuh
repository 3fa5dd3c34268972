// The tasks of packed sequences. Their lengths are known on the device alone, so a kernel of one thread block lists the
// tiles of one head, the longest first, and the Hopper kernels take their tasks from that list.
#pragma once
#include "barrier.cuh"
#include "mask.cuh"

// What p.tasks holds: first the number of tasks in `tile`, then the tasks.
struct alignas(16) Record {
    int index;  // of the sequence; NONE: there is no such task
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

// The listed tasks of this thread block, of each of `heads` heads, visit(work). The leader, one thread, takes their
// numbers from a counter, the next while a task is worked on, and tells the others; these are single threads, or whole
// warps (WARP). Where tiles wait for each other (SPEC.deterministic) no number is taken ahead, and the first one too is
// taken, so that all tasks before a taken one are being worked on by blocks that run, however few of the grid do.
template <bool LEADER, bool WARP, typename Visit>
__device__ __forceinline__ void for_each_listed(const Params& p, const Mail& mail, int heads, Visit visit) {
    constexpr bool AHEAD = LEADER && !SPEC.deterministic;
    const Record* records = reinterpret_cast<const Record*>(p.tasks);
    auto take = [&] { return static_cast<int>(AHEAD ? gridDim.x : 0) + atomicAdd(p.tickets, 1); };
    // The shuffle tells the compiler that a word is the same in the whole warp.
    auto same = [](int word) { return WARP ? __shfl_sync(0xFFFFFFFF, word, 0) : word; };
    unsigned int parity = 0;
    int number = AHEAD ? blockIdx.x : 0, head = 0;
    auto next_rank = [&] {
        int rank;
        if constexpr (LEADER) {
            if constexpr (!AHEAD) number = take();
            const int tasks = records->tile;
            unsigned int own_head = 0;
            rank = number < tasks * heads ? rank_in_section(p, number, tasks, heads, own_head) : NONE;
            head = own_head;
            barrier_wait(mail.empty, parity ^ 1);
            store_shared_word(mail.words, rank);
            store_shared_word(mail.words + 4, head);
            barrier_arrive(mail.full);
        } else {
            barrier_wait(mail.full, parity);
            rank = same(load_shared_word(mail.words));
            head = same(load_shared_word(mail.words + 4));
            if (!WARP || threadIdx.x % 32 == 0) barrier_arrive(mail.empty);
        }
        parity ^= 1;
        return rank;
    };
    int rank = next_rank();
#pragma unroll 1
    while (rank != NONE) {
        if constexpr (AHEAD) number = take();
        const Record record = records[1 + rank];
        const Sequence sequence{same(record.index), 0, same(record.q_start), same(record.kv_start), same(record.q_len),
                                same(record.kv_len)};
        if (sequence.index != NONE) visit(Work{sequence, head, same(record.tile), true});
        rank = next_rank();
    }
}

// One thread block lists the tiles of queries (BY_KEYS: of keys) by how many tiles of the other side they visit: a
// counting sort, of which equal ones come out in any order. Where a kernel's tiles wait for each other
// (SPEC.deterministic) they keep the order of find_work, gaps and all, in which those before come first.
template <bool BY_KEYS>
__device__ __forceinline__ void list_tasks(const Params& p) {
    constexpr int ROWS = BY_KEYS ? TILE.cols : TILE.rows;
    const int tiles = BY_KEYS ? p.kv_tiles : p.q_tiles;
    Record* records = reinterpret_cast<Record*>(p.tasks);
    auto list = [&](int rank, const Work& work) {
        const Sequence& s = work.sequence;
        const int index = work.exists ? s.index : NONE;
        records[1 + rank] = Record{index, work.tile, s.q_start, s.q_len, s.kv_start, s.kv_len, {}};
    };
    auto number = [&](int tasks) { records[0] = Record{NONE, tasks, 0, 0, 0, 0, {}}; };
    if constexpr (SPEC.deterministic) {
        for (int i = threadIdx.x; i < tiles; i += THREADS) list(i, find_work<ROWS, BY_KEYS>(p, i, tiles, 1));
        if (threadIdx.x == 0) number(tiles);
        return;
    }

    // A place for each number of tiles visited, the largest first; several numbers share one where there are too many.
    __shared__ int places[THREADS];
    const int most = BY_KEYS ? p.q_len / TILE.rows + 1 : p.kv_len / TILE.cols + 1;
    int shift = 0;
    while (most >> shift >= THREADS) ++shift;
    auto place = [&](const Work& work) {
        const Band band(p, work.sequence);
        const int first = work.tile * ROWS;
        const int last = min(first + ROWS, BY_KEYS ? band.kv_len : band.q_len) - 1;
        const TileRange visited = BY_KEYS ? band.q_tiles(first, last) : band.kv_tiles(first, last);
        return &places[THREADS - 1 - (visited.last - visited.first >> shift)];
    };

    places[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tiles; i += THREADS) {
        const Work work = find_work<ROWS, BY_KEYS>(p, i, tiles, 1);
        if (work.exists) atomicAdd(place(work), 1);
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
    if (threadIdx.x == THREADS - 1) number(sum);
    places[threadIdx.x] = sum - own;
    __syncthreads();
    for (int i = threadIdx.x; i < tiles; i += THREADS) {
        const Work work = find_work<ROWS, BY_KEYS>(p, i, tiles, 1);
        if (work.exists) list(atomicAdd(place(work), 1), work);
    }
}
