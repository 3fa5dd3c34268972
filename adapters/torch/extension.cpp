// Attention on q, k and v of PyTorch without another array, in eager mode on a GPU, without Python on its way: the plan
// is looked up, memory allocated and the kernels launched here, and the node of the autograd graph is one of C++.
//
// Python makes the plans (cuflash.adapters.torch._extension) and remains the way for every other call, which gets
// NotImplemented here, or `backward` from the node. CUDA comes as addresses of its functions: nothing is compiled
// against it, and tests can stand in for it.
#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::variable_list;

// ---- what Python gives once ------------------------------------------------------------------------------------

// cuLaunchKernel, cuTensorMapReplaceAddress, cuMemsetD8Async of the driver, and torch's way to its current stream.
struct Functions {
    int (*launch)(void* kernel, unsigned int blocks, unsigned int, unsigned int, unsigned int threads, unsigned int,
                  unsigned int, unsigned int shared_bytes, void* stream, void** arguments, void** extra);
    int (*point)(void* tensor_map, void* address);
    int (*zero)(std::uint64_t address, unsigned char value, std::size_t bytes, void* stream);
    int (*current_stream)(std::int32_t device, void** stream);
};

// The callables of Python. They are never released: the interpreter may be gone before this is.
struct Callables {
    py::handle prepare_forward;   // (q, k, v, settings, with_lse): the shapes of out and LSE, and a recipe; or None
    py::handle prepare_backward;  // (dout, q, k, v, out, lse, settings): a recipe, or None
    py::handle backward;          // (dout, dlse, q, k, v, out, lse, settings): the gradients of any call
    py::handle enter_thread;      // (): the driver knows no device in a new thread
};

Functions functions;
Callables callables;
c10::DeviceType device_type = c10::DeviceType::CUDA;
int operand_count = 0;  // of cuflash.cuda.launch.OPERANDS
int seed_place = 0;     // among the options

// Once in each thread, before the driver is asked for anything.
void enter_thread() {
    thread_local bool entered = false;
    if (!entered) {
        py::gil_scoped_acquire gil;
        callables.enter_thread();
        entered = true;
    }
}

void check(int status, const char* function) { TORCH_CHECK(status == 0, function, " failed with CUresult ", status); }

// ---- recipes: cuflash.cuda.launch.Plan without Python --------------------------------------------------------------

constexpr int MOST_WORDS = 128, MOST_MAPS = 4;

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// One launch: its arguments but for the pointers, and where these go.
struct Launch {
    void* kernel;
    unsigned int blocks, threads, shared_bytes;
    std::vector<std::uint64_t> params;                   // struct Params in words
    std::vector<std::pair<int, int>> operands;           // a word of it, and the operand whose pointer it is
    std::vector<std::pair<int, std::uint64_t>> parts;    // a word of it, and a part of the workspace
    std::vector<std::pair<TensorMap, int>> tensor_maps;  // and the operand of each
};

struct Recipe {
    int device;
    std::size_t workspace, zero_first, zero_last;  // bytes, and those that must be zeros
    std::vector<Launch> launches;

    // `pointers` to the operands in the order of cuflash.cuda.launch.OPERANDS, null for those that the call lacks.
    void run(const std::vector<void*>& pointers) const {
        void* stream = nullptr;
        check(functions.current_stream(device, &stream), "the query for the current stream");
        Tensor memory;
        std::uint64_t start = 0;
        if (workspace > 0) {
            memory = at::empty({static_cast<std::int64_t>(workspace)},
                               at::TensorOptions(c10::Device(device_type, device)).dtype(at::kByte));
            start = reinterpret_cast<std::uint64_t>(memory.data_ptr());
        }
        if (zero_last > zero_first) {
            check(functions.zero(start + zero_first, 0, zero_last - zero_first, stream), "cuMemsetD8Async");
        }
        for (const Launch& launch : launches) {
            std::uint64_t params[MOST_WORDS];
            TensorMap maps[MOST_MAPS];
            void* arguments[1 + MOST_MAPS] = {params};
            std::memcpy(params, launch.params.data(), sizeof(std::uint64_t) * launch.params.size());
            for (auto [word, operand] : launch.operands) {
                params[word] = reinterpret_cast<std::uint64_t>(pointers[operand]);
            }
            for (auto [word, offset] : launch.parts) params[word] = start + offset;
            for (std::size_t i = 0; i < launch.tensor_maps.size(); ++i) {
                const auto& [tensor_map, operand] = launch.tensor_maps[i];
                maps[i] = tensor_map;
                arguments[1 + i] = &maps[i];
                check(functions.point(&maps[i], pointers[operand]), "cuTensorMapReplaceAddress");
            }
            check(functions.launch(launch.kernel, launch.blocks, 1, 1, launch.threads, 1, 1, launch.shared_bytes,
                                   stream, arguments, nullptr),
                  "cuLaunchKernel");
        }
    }
};

Recipe recipe_of(const py::tuple& given) {
    Recipe recipe;
    recipe.device = given[0].cast<int>();
    recipe.workspace = given[1].cast<std::size_t>();
    std::tie(recipe.zero_first, recipe.zero_last) = given[2].cast<std::pair<std::size_t, std::size_t>>();
    for (const py::handle item : given[3]) {
        const py::tuple launch_given = item.cast<py::tuple>();
        Launch launch;
        launch.kernel = reinterpret_cast<void*>(launch_given[0].cast<std::uint64_t>());
        std::tie(launch.blocks, launch.threads, launch.shared_bytes) =
            launch_given[1].cast<std::tuple<unsigned int, unsigned int, unsigned int>>();
        const auto params = launch_given[2].cast<std::string>();
        launch.params.resize(params.size() / sizeof(std::uint64_t));
        TORCH_CHECK(launch.params.size() <= MOST_WORDS, "struct Params has ", params.size(), " bytes");
        std::memcpy(launch.params.data(), params.data(), sizeof(std::uint64_t) * launch.params.size());
        launch.operands = launch_given[3].cast<std::vector<std::pair<int, int>>>();
        launch.parts = launch_given[4].cast<std::vector<std::pair<int, std::uint64_t>>>();
        for (const auto& [bytes, operand] : launch_given[5].cast<std::vector<std::pair<std::string, int>>>()) {
            TensorMap tensor_map;
            TORCH_CHECK(bytes.size() == sizeof(tensor_map), "a tensor map has ", bytes.size(), " bytes");
            std::memcpy(tensor_map.bytes, bytes.data(), sizeof(tensor_map));
            launch.tensor_maps.emplace_back(tensor_map, operand);
        }
        TORCH_CHECK(launch.tensor_maps.size() <= MOST_MAPS, launch.tensor_maps.size(), " tensor maps");
        recipe.launches.push_back(std::move(launch));
    }
    return recipe;
}

// ---- calls by the description of their tensors ---------------------------------------------------------------------

using Description = std::vector<std::int64_t>;  // dtypes, shapes and strides

void describe(Description& description, const Tensor& x) {
    description.push_back(static_cast<std::int64_t>(x.scalar_type()));
    description.push_back(x.dim());
    description.insert(description.end(), x.sizes().begin(), x.sizes().end());
    description.insert(description.end(), x.strides().begin(), x.strides().end());
}

std::size_t hash_of(const Description& description, std::size_t hash) {
    for (const std::int64_t x : description) hash = (hash ^ static_cast<std::size_t>(x)) * 0x9E3779B97F4A7C15 + 1;
    return hash ^ hash >> 32;
}

// Whether an option, or all of a tuple of them, is of a type of Python's own: comparing them runs nobody's code.
bool is_simple(PyObject* x) {
    if (PyTuple_CheckExact(x)) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) {
            if (!is_simple(PyTuple_GET_ITEM(x, i))) return false;
        }
        return true;
    }
    return x == Py_None || PyBool_Check(x) || PyLong_CheckExact(x) || PyFloat_CheckExact(x) || PyUnicode_CheckExact(x);
}

// Whether two tuples of options are the same to a plan: 1 is not True.
bool same_settings(PyObject* a, PyObject* b) {
    if (a == b) return true;
    const Py_ssize_t size = PyTuple_GET_SIZE(a);
    if (size != PyTuple_GET_SIZE(b)) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject *x = PyTuple_GET_ITEM(a, i), *y = PyTuple_GET_ITEM(b, i);
        if (x == y) continue;
        if (Py_TYPE(x) != Py_TYPE(y)) return false;
        const int equal = PyObject_RichCompareBool(x, y, Py_EQ);
        if (equal < 0) throw py::error_already_set();
        if (equal == 0) return false;
    }
    return true;
}

// A forward, and its backward for each layout of dout and of what was saved that came.
struct Call {
    Description description;
    PyObject* settings;  // one of `Calls::kept`
    std::vector<std::int64_t> out_shape, lse_shape;
    std::optional<Recipe> forward;  // not there: Python serves it
    std::mutex guard;
    std::vector<std::pair<Description, std::shared_ptr<const Recipe>>> backwards;  // null: Python serves it
};

constexpr std::size_t MOST_CALLS = 1024, MOST_BACKWARDS = 16;

// All calls known, by a number that autograd's nodes keep. No code of Python's runs under a lock, here or in a Call.
struct Calls {
    std::mutex guard;
    std::unordered_multimap<std::size_t, std::int64_t> numbers;  // by the hash
    std::unordered_map<std::int64_t, std::shared_ptr<Call>> calls;
    std::int64_t next = 0;
    // Tuples of options, one of all that are the same: never released, since nodes of the graph refer to them.
    std::unordered_multimap<std::size_t, PyObject*> kept;

    PyObject* keep(PyObject* settings, std::size_t hash) {
        const auto [first, last] = kept.equal_range(hash);
        for (auto found = first; found != last; ++found) {
            if (same_settings(found->second, settings)) return found->second;
        }
        Py_INCREF(settings);
        kept.emplace(hash, settings);
        return settings;
    }
};

Calls& known() {
    static Calls* calls = new Calls;
    return *calls;
}

void forget() {
    std::lock_guard lock(known().guard);
    known().numbers.clear();
    known().calls.clear();
}

std::shared_ptr<Call> call_of(std::int64_t number) {
    std::lock_guard lock(known().guard);
    const auto found = known().calls.find(number);
    return found == known().calls.end() ? nullptr : found->second;
}

// ---- the two passes ------------------------------------------------------------------------------------------------

bool aligned(const Tensor& x) { return reinterpret_cast<std::uintptr_t>(x.data_ptr()) % 16 == 0; }

// Whether a tensor is plain memory on the device of `like`, of a class that overrides nothing.
bool is_plain(const Tensor& x, const Tensor& like) {
    return x.layout() == at::kStrided && x.device() == like.device() && x.device().type() == device_type &&
           !x.is_neg() && !x.is_nested() && !x.unsafeGetTensorImpl()->is_python_dispatch() && aligned(x);
}

// Whether something between the caller and the memory must see operators.
bool is_seen() {
    return at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled() ||
           c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The places of the operands in cuflash.cuda.launch.OPERANDS.
enum Operand { Q, K, V, OUT, DOUT, DQ, DK, DV, LSE };

std::pair<Tensor, Tensor> run_forward(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                                      bool with_lse) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor out = at::empty(call.out_shape, q.options()), lse;
    if (with_lse) lse = at::empty(call.lse_shape, q.options().dtype(at::kFloat));
    std::vector<void*> pointers(operand_count);
    pointers[Q] = q.data_ptr(), pointers[K] = k.data_ptr(), pointers[V] = v.data_ptr(), pointers[OUT] = out.data_ptr();
    pointers[LSE] = with_lse ? lse.data_ptr() : nullptr;
    call.forward->run(pointers);
    return {out, lse};
}

// The recipe of a call's backward for this dout and what was saved, which hooks may have given another layout; null
// where Python serves it.
std::shared_ptr<const Recipe> backward_recipe(Call& call, const Tensor& dout, const variable_list& saved) {
    Description description{dout.get_device()};
    describe(description, dout);
    for (const Tensor& x : saved) describe(description, x);
    {
        std::lock_guard lock(call.guard);
        for (const auto& [known_description, recipe] : call.backwards) {
            if (known_description == description) return recipe;
        }
    }
    std::shared_ptr<const Recipe> recipe;
    {
        py::gil_scoped_acquire gil;
        const py::object given = callables.prepare_backward(dout, saved[0], saved[1], saved[2], saved[3], saved[4],
                                                            py::handle(call.settings));
        if (!given.is_none()) recipe = std::make_shared<Recipe>(recipe_of(given));
    }
    std::lock_guard lock(call.guard);
    if (call.backwards.size() == MOST_BACKWARDS) call.backwards.clear();
    call.backwards.emplace_back(std::move(description), recipe);
    return recipe;
}

// Attention with gradients. The call's number and its options are kept by the node as integers.
struct Attention : torch::autograd::Function<Attention> {
    static variable_list forward(torch::autograd::AutogradContext* context, const Tensor& q, const Tensor& k,
                                 const Tensor& v, std::int64_t number, const Call* call, bool return_lse) {
        auto [out, lse] = run_forward(*call, q, k, v, true);
        context->set_materialize_grads(false);
        context->save_for_backward({q, k, v, out, lse});
        context->saved_data["call"] = number;
        context->saved_data["settings"] = reinterpret_cast<std::int64_t>(call->settings);
        return return_lse ? variable_list{out, lse} : variable_list{out};
    }

    static variable_list backward(torch::autograd::AutogradContext* context, variable_list gradients) {
        const variable_list saved = context->get_saved_variables();
        const Tensor &q = saved[0], &dout = gradients[0];
        const Tensor dlse = gradients.size() > 1 ? gradients[1] : Tensor();
        variable_list results;
        // With create_graph=True the gradients carry a derivative, which raises.
        bool plain = dout.defined() && !dlse.defined() && !at::GradMode::is_enabled() && is_plain(dout, q) &&
                     dout.stride(-1) == 1;
        for (const Tensor& x : saved) plain = plain && is_plain(x, q);
        if (plain) {
            c10::OptionalDeviceGuard device(q.device());
            enter_thread();
            if (const auto call = call_of(context->saved_data["call"].toInt())) {
                if (const auto recipe = backward_recipe(*call, dout, saved)) {
                    at::AutoDispatchBelowADInplaceOrView below;
                    std::vector<void*> pointers(operand_count);
                    constexpr Operand OF_SAVED[] = {Q, K, V, OUT, LSE};
                    for (int i = 0; i < 5; ++i) pointers[OF_SAVED[i]] = saved[i].data_ptr();
                    pointers[DOUT] = dout.data_ptr();
                    for (int i = 0; i < 3; ++i) {
                        results.push_back(at::empty(saved[i].sizes(), saved[i].options()));
                        pointers[DQ + i] = results[i].data_ptr();
                    }
                    recipe->run(pointers);
                }
            }
        }
        if (results.empty()) {
            py::gil_scoped_acquire gil;
            const py::handle settings(reinterpret_cast<PyObject*>(context->saved_data["settings"].toInt()));
            auto object = [](const Tensor& x) { return x.defined() ? py::cast(x) : py::none(); };
            const py::object found =
                callables.backward(object(dout), object(dlse), q, saved[1], saved[2], saved[3], saved[4], settings);
            results = found.cast<variable_list>();
        }
        results.resize(6);  // nothing for what is no tensor
        return results;
    }
};

// cuflash.adapters.torch.attention.attend, or NotImplemented.
py::object attend(const py::tuple& tensors, const py::tuple& settings, py::handle return_lse) {
    const auto not_implemented = [] { return py::reinterpret_borrow<py::object>(Py_NotImplemented); };
    Tensor x[3];
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        PyObject* given = PyTuple_GET_ITEM(tensors.ptr(), i);
        if (i >= 3 ? given != Py_None : !THPVariable_CheckExact(given)) return not_implemented();
        if (i < 3) x[i] = THPVariable_Unpack(given);
    }
    const auto& [q, k, v] = x;
    if (!PyBool_Check(return_lse.ptr()) || !is_simple(settings.ptr()) ||
        PyTuple_GET_ITEM(settings.ptr(), seed_place) != Py_None || is_seen() ||
        at::globalContext().deterministicAlgorithms() || at::autocast::is_autocast_enabled(device_type)) {
        return not_implemented();
    }
    bool with_gradients = false;
    for (const Tensor& y : x) {
        if (!is_plain(y, q) || y._fw_grad(0).defined()) return not_implemented();
        with_gradients |= y.requires_grad();
    }
    with_gradients &= at::GradMode::is_enabled();
    const bool wants_lse = return_lse.ptr() == Py_True, with_lse = with_gradients || wants_lse;

    c10::OptionalDeviceGuard device(q.device());
    enter_thread();
    Description description{q.get_device()};
    for (const Tensor& y : x) describe(description, y);
    const Py_hash_t settings_hash = PyObject_Hash(settings.ptr());
    const std::size_t hash = hash_of(description, settings_hash);
    Calls& calls = known();
    std::shared_ptr<Call> call;
    std::int64_t number = -1;
    {
        std::lock_guard lock(calls.guard);
        const auto [first, last] = calls.numbers.equal_range(hash);
        for (auto found = first; found != last && !call; ++found) {
            const std::shared_ptr<Call>& candidate = calls.calls[found->second];
            if (candidate->description == description && same_settings(candidate->settings, settings.ptr())) {
                number = found->second;
                call = candidate;
            }
        }
    }
    if (!call) {
        call = std::make_shared<Call>();
        call->description = std::move(description);
        const py::object given = callables.prepare_forward(q, k, v, settings, with_lse);
        if (!given.is_none()) {
            const py::tuple parts = given.cast<py::tuple>();
            call->out_shape = parts[0].cast<std::vector<std::int64_t>>();
            call->lse_shape = parts[1].cast<std::vector<std::int64_t>>();
            call->forward = recipe_of(parts[2]);
        }
        std::lock_guard lock(calls.guard);
        call->settings = calls.keep(settings.ptr(), settings_hash);
        if (calls.calls.size() >= MOST_CALLS) {
            calls.numbers.clear();
            calls.calls.clear();
        }
        number = calls.next++;
        calls.numbers.emplace(hash, number);
        calls.calls.emplace(number, call);
    }
    if (!call->forward) return not_implemented();
    if (with_gradients) {
        const variable_list results =
            Attention::apply(q, k, v, number, static_cast<const Call*>(call.get()), wants_lse);
        return wants_lse ? py::object(py::make_tuple(results[0], results[1])) : py::cast(results[0]);
    }
    auto [out, lse] = run_forward(*call, q, k, v, with_lse);
    return wants_lse ? py::object(py::make_tuple(out, lse)) : py::cast(out);
}

void configure(const std::vector<std::uint64_t>& addresses, const py::tuple& given, const std::string& type,
               int operands, int seed) {
    functions.launch = reinterpret_cast<decltype(functions.launch)>(addresses.at(0));
    functions.point = reinterpret_cast<decltype(functions.point)>(addresses.at(1));
    functions.zero = reinterpret_cast<decltype(functions.zero)>(addresses.at(2));
    functions.current_stream = reinterpret_cast<decltype(functions.current_stream)>(addresses.at(3));
    py::handle* targets[] = {&callables.prepare_forward, &callables.prepare_backward, &callables.backward,
                             &callables.enter_thread};
    for (std::size_t i = 0; i < 4; ++i) *targets[i] = py::object(given[i]).release();
    device_type = c10::Device(type).type();
    operand_count = operands;
    seed_place = seed;
    forget();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("configure", torch::wrap_pybind_function(configure));
    module.def("attend", torch::wrap_pybind_function(attend));
    module.def("forget", torch::wrap_pybind_function(forget));
}
