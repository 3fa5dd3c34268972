// The tasks of forward_hopper.cu for packed sequences, in p.tasks, and its counter put to zero.
#include "list.cuh"

KERNEL(forward_list, 1)(ARGUMENT(Params) p) {
    if (threadIdx.x == 0) *p.tickets = 0;
    list_tasks<false>(p);
}
