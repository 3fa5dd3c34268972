// The tasks of the Hopper kernels of dK and dV for packed sequences, in p.tasks.
#include "list.cuh"

KERNEL(backward_list, 1)(ARGUMENT(Params) p) { list_tasks<true>(p); }
