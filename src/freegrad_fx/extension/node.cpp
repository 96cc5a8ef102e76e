// The backward of a decoupled operation as an autograd node in C++, and the two calls around the operation.
//
// Every function here handles the usual case alone, and otherwise calls the Python function that it stands for. A node
// runs the program of a rule, if it has one (see program.py); otherwise it calls the rule in Python.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/tensor_dtypes.h>
#include <torch/version.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <unordered_map>

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Nodes are counted by themselves since PyTorch 2.13
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
template <typename T>
using NodePointer = c10::intrusive_ptr<T>;
template <typename T, typename... Args>
NodePointer<T> make_node(Args&&... args) {
  return c10::make_intrusive<T>(std::forward<Args>(args)...);
}
#else
template <typename T>
using NodePointer = std::shared_ptr<T>;
template <typename T, typename... Args>
NodePointer<T> make_node(Args&&... args) {
  return NodePointer<T>(new T(std::forward<Args>(args)...), torch::autograd::deleteNode);
}
#endif

namespace {

// --- what Python gives this module, once ---

struct Python {
  PyObject* used = nullptr;      // a list, empty until a block is entered
  PyObject* state = nullptr;     // the blocks of the thread
  PyObject* entered = nullptr;   // the blocks of the asynchronous task
  PyObject* observed = nullptr;  // a list, empty until anybody observes gradients
  PyObject* thread = nullptr;    // the observers of the thread
  PyObject* get = nullptr;       // the rule of a name
  PyObject* gradient = nullptr;  // computes a gradient, given a node and the gradient of its output
  PyObject* program = nullptr;   // the program of a rule, or None
  PyObject* stand_in = nullptr;  // a node of the Python Function, given a node
  PyObject* explicit_ = nullptr;
  PyObject* blocks = nullptr;
  PyObject* rule = nullptr;
  PyObject* observers = nullptr;
} python;

[[noreturn]] void raise_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

bool is_true_attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) raise_python_error();
  bool result = value == Py_True;
  Py_DECREF(value);
  return result;
}

// Whether rules of tables act, and no block of another task is in force. Python raises the error for the latter.
bool rules_act() {
  if (PyList_GET_SIZE(python.used) == 0) return true;
  PyObject *seen = nullptr, *own = PyObject_GetAttr(python.state, python.blocks);
  if (!own) raise_python_error();
  if (PyContextVar_Get(python.entered, nullptr, &seen) < 0) {
    Py_DECREF(own);
    raise_python_error();
  }
  bool same = seen == own;
  Py_XDECREF(seen);
  Py_DECREF(own);
  return same && is_true_attribute(python.state, python.explicit_);
}

// Whether nobody observes the gradients of rules in this thread.
bool is_unobserved() {
  if (PyList_GET_SIZE(python.observed) == 0) return true;
  PyObject* observers = PyObject_GetAttr(python.thread, python.observers);
  int any = observers ? PyObject_IsTrue(observers) : -1;
  Py_XDECREF(observers);
  if (any < 0) raise_python_error();
  return !any;
}

// Whether nothing transforms, records or traces the calls of this thread.
bool runs_plainly() {
  auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  constexpr c10::DispatchKeySet special({
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
      c10::DispatchKey::FuncTorchDynamicLayerBackMode,
      c10::DispatchKey::PreDispatch,
      c10::DispatchKey::Python,
      c10::DispatchKey::Functionalize,
      c10::DispatchKey::Tracer,
  });
  return !keys.has_any(special) && !c10::impl::dispatch_mode_enabled() &&
      !at::impl::torch_function_mode_enabled() && !c10::InferenceMode::is_enabled();
}

bool is_plain(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && at::isFloatingType(tensor.scalar_type()) &&
      !at::isTensorSubclassLike(tensor) && !tensor.is_inference() && !tensor.is_neg() &&
      !tensor.is_meta() && !tensor.is_nested() &&
      !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && !torch::autograd::isFwGradDefined(tensor);
}

// --- programs: elementwise arithmetic in blocks that fit into the nearest cache ---

enum Operation : int { ADD, SUB, MUL, DIV, NEG, ABS, LT, LE, GT, GE, EQ, NE, AND, OR, NOT, WHERE, LEAST, MOST };

struct Step {
  int operation, to, a, b, c;
};

constexpr int64_t BLOCK = 256;
constexpr int REGISTERS = 24;
constexpr int64_t SERIAL = 32768;  // what PyTorch's kernels do not divide among threads

template <typename T, typename To, typename F>
inline void each(To* to, const T* a, const T* b, int64_t n, F f) {
  for (int64_t i = 0; i < n; ++i) to[i] = To(f(a[i], b[i]));
}

// Booleans are 0 and 1. A comparison with NaN is false, and the two bounds return NaN for NaN, as PyTorch's do.
template <typename T, typename To>
void run_step(int operation, To* to, const T* a, const T* b, const T* c, int64_t n) {
  switch (operation) {
    case ADD: return each(to, a, b, n, [](T x, T y) { return x + y; });
    case SUB: return each(to, a, b, n, [](T x, T y) { return x - y; });
    case MUL: return each(to, a, b, n, [](T x, T y) { return x * y; });
    case DIV: return each(to, a, b, n, [](T x, T y) { return x / y; });
    case NEG: return each(to, a, a, n, [](T x, T) { return -x; });
    case ABS: return each(to, a, a, n, [](T x, T) { return std::abs(x); });
    case LT: return each(to, a, b, n, [](T x, T y) { return T(x < y); });
    case LE: return each(to, a, b, n, [](T x, T y) { return T(x <= y); });
    case GT: return each(to, a, b, n, [](T x, T y) { return T(x > y); });
    case GE: return each(to, a, b, n, [](T x, T y) { return T(x >= y); });
    case EQ: return each(to, a, b, n, [](T x, T y) { return T(x == y); });
    case NE: return each(to, a, b, n, [](T x, T y) { return T(x != y); });
    case AND: return each(to, a, b, n, [](T x, T y) { return x * y; });
    case OR: return each(to, a, b, n, [](T x, T y) { return x > y ? x : y; });
    case NOT: return each(to, a, a, n, [](T x, T) { return T(1) - x; });
    case LEAST: return each(to, a, b, n, [](T x, T y) { return x < y ? y : x; });
    case MOST: return each(to, a, b, n, [](T x, T y) { return x > y ? y : x; });
    case WHERE:
      for (int64_t i = 0; i < n; ++i) to[i] = To(a[i] != T(0) ? b[i] : c[i]);
  }
}

// A rule's formula for one dtype. Registers: 0 the gradient, 1 x, 2 y, then constants, then results.
template <typename T>
struct Program {
  enum Known { UNKNOWN, ABSENT, READY };
  std::atomic<Known> known = UNKNOWN;
  std::vector<Step> steps;
  std::vector<std::array<T, BLOCK>> constants;
  int results = 0, result = 0;
  bool reads[3] = {false, false, false};
  bool only_gates = false;  // grad where x is true, else 0

  // Constants, steps and the place of the result: see program.py.
  void set(const pybind11::object& given) {
    auto [numbers, list, place] = given.cast<
        std::tuple<std::vector<double>, std::vector<std::tuple<int, int, int, int, int>>, int>>();
    for (double number : numbers) constants.emplace_back().fill(T(number));
    if (place < 3) reads[place] = true;
    for (auto [operation, to, a, b, c] : list) {
      steps.push_back({operation, to, a, b, c});
      for (int input : {a, b, c})
        if (input < 3) reads[input] = true;
    }
    results = int(steps.size());
    result = place;
    const Step* first = steps.size() == 1 ? &steps[0] : nullptr;
    if (first && first->operation == WHERE && first->a == 1 && first->b == 0 && first->c == 3) {
      T otherwise = constants[0][0];
      only_gates = otherwise == T(0) && !std::signbit(otherwise);
    }
  }

  // A mask is given in the place of x, or is the result.
  template <typename To>
  void run(To* to, const T* grad, const T* x, const T* y, int64_t count, const bool* mask = nullptr) const {
    alignas(64) T buffers[REGISTERS][BLOCK];
    alignas(64) T of_mask[BLOCK];
    const T* places[REGISTERS] = {};
    int constants_end = 3 + int(constants.size());
    for (size_t i = 0; i < constants.size(); ++i) places[3 + i] = constants[i].data();
    for (int i = constants_end; i < constants_end + results; ++i) places[i] = buffers[i];
    for (int64_t start = 0; start < count; start += BLOCK) {
      int64_t n = std::min(BLOCK, count - start);
      places[0] = grad + start;
      places[1] = mask ? of_mask : x ? x + start : nullptr;
      if (mask)
        for (int64_t i = 0; i < n; ++i) of_mask[i] = T(mask[start + i]);
      places[2] = y ? y + start : nullptr;
      for (const Step& step : steps) {
        const T *a = places[step.a], *b = places[step.b], *c = places[step.c];
        if (step.to == result)
          run_step(step.operation, to + start, a, b, c, n);
        else
          run_step(step.operation, buffers[step.to], a, b, c, n);
      }
      if (result < constants_end) std::copy(places[result], places[result] + n, to + start);
    }
  }
};

// --- a rule at a site ---

enum From : int { NOTHING, INPUT, OUTPUT, MASK };

constexpr int64_t CHUNK = 16 * BLOCK;  // of a mask, for several threads

struct Site {
  PyObject* call;  // the rule, the site, the parameters and the options
  int x;           // what is saved as x
  bool saves_y;
  Program<float> of_float, mask_of_float;
  Program<double> of_double, mask_of_double;

  Site(PyObject* call, int x, bool saves_y) : call(call), x(x), saves_y(saves_y) {
    Py_INCREF(call);
  }
  Site(const Site&) = delete;
  ~Site() {
    if (!Py_IsInitialized()) return;
    pybind11::gil_scoped_acquire gil;
    Py_DECREF(call);
  }

  template <typename T>
  const Program<T>* program() {
    if constexpr (std::is_same_v<T, float>)
      return known(of_float, x == MASK ? "gate" : "function");
    else
      return known(of_double, x == MASK ? "gate" : "function");
  }

  template <typename T>
  const Program<T>* mask() {
    if constexpr (std::is_same_v<T, float>)
      return known(mask_of_float, "mask");
    else
      return known(mask_of_double, "mask");
  }

  template <typename T>
  const Program<T>* known(Program<T>& found, const char* part) {
    if (found.known == Program<T>::UNKNOWN) {  // it is written once, by a thread that has the GIL
      pybind11::gil_scoped_acquire gil;
      if (found.known == Program<T>::UNKNOWN) learn(found, part);
    }
    return found.known == Program<T>::READY ? &found : nullptr;
  }

  template <typename T>
  void learn(Program<T>& found, const char* part) {
    auto dtype = torch::getTHPDtype(std::is_same_v<T, float> ? at::kFloat : at::kDouble);
    auto got = pybind11::reinterpret_borrow<pybind11::object>(python.program)(
        pybind11::handle(call), pybind11::handle((PyObject*)dtype), part);
    if (!got.is_none()) found.set(got);
    found.known = got.is_none() ? Program<T>::ABSENT : Program<T>::READY;
  }
};

// The mask of x, in one pass.
template <typename T>
Tensor mask_of(const Tensor& x, const Program<T>& program) {
  Tensor mask = at::empty_like(x, x.options().dtype(at::kBool).requires_grad(false));
  const T* from = x.const_data_ptr<T>();
  bool* to = mask.mutable_data_ptr<bool>();
  int64_t count = x.numel();
  at::parallel_for(0, (count + CHUNK - 1) / CHUNK, SERIAL / CHUNK, [&](int64_t first, int64_t last) {
    int64_t start = first * CHUNK, n = std::min(last * CHUNK, count) - start;
    program.run(to + start, from + start, from + start, from + start, n);
  });
  return mask;
}

// The mask that a site saves; undefined if Python has to compute it.
Tensor mask_of(const Tensor& x, Site& site) {
  if (!x.is_cpu() || !x.is_non_overlapping_and_dense()) return {};
  if (x.scalar_type() == at::kFloat) {
    auto program = site.program<float>() ? site.mask<float>() : nullptr;
    return program ? mask_of(x, *program) : Tensor();
  }
  if (x.scalar_type() != at::kDouble) return {};
  auto program = site.program<double>() ? site.mask<double>() : nullptr;
  return program ? mask_of(x, *program) : Tensor();
}

// --- the node ---

struct Decoupled : Node {
  std::shared_ptr<Site> site;
  SavedVariable x, y;
  c10::DimVector shape;
  at::ScalarType dtype;
  bool released = false;
  mutable NodePointer<Node> python_node;  // for compiled autograd

  std::string name() const override {
    return "_DecoupledBackward";
  }

  void release_variables() override {
    x.reset_data();
    y.reset_data();
    released = true;
  }

  bool needs_gradient() const {
    return next_edge(1).is_valid();
  }

  NodePointer<Node> itself() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
    return NodePointer<Node>::reclaim_copy(this);
#else
    return getptr();
#endif
  }

  variable_list saved() {
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list found;
    if (site->x) found.push_back(x.unpack(itself()));
    if (site->saves_y) found.push_back(y.unpack(itself()));
    return found;
  }

  variable_list apply(variable_list&& grads) override {
    Tensor grad = std::move(grads[0]);
    if (!grad.defined()) grad = input_metadata(0).zeros_like();
    variable_list results(2);
    if (needs_gradient()) {
      results[1] = quickly(grad);
      if (!results[1].defined()) results[1] = by_rule(grad);
    }
    results[0] = std::move(grad);
    return results;
  }

  Tensor quickly(const Tensor& grad) {
    if (at::GradMode::is_enabled() || grad.scalar_type() != dtype || grad.sizes() != shape ||
        !grad.is_cpu() || !runs_plainly() || !is_plain(grad))
      return {};
    if (dtype == at::kFloat) return run<float>(grad);
    return dtype == at::kDouble ? run<double>(grad) : Tensor();
  }

  template <typename T>
  Tensor run(const Tensor& grad) {
    bool masked = site->x == MASK;
    if (!masked && grad.numel() > SERIAL && at::get_num_threads() > 1) return {};
    auto program = site->program<T>();
    if (!program) return {};
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    if (program->result == 0) return grad;
    Tensor from = grad, read_x, read_y;
    if (program->reads[1]) read_x = x.unpack(itself());
    if (program->reads[2]) read_y = y.unpack(itself());
    Tensor like;
    for (const Tensor* read : {&read_x, &read_y}) {
      if (!read->defined()) continue;
      auto expected = masked && read == &read_x ? at::kBool : dtype;
      if (read->scalar_type() != expected || read->sizes() != grad.sizes() || !read->is_cpu() || !(is_plain(*read) || expected == at::kBool) ||
          (like.defined() && like.strides() != read->strides()))
        return {};
      like = *read;
    }
    auto strides = grad.strides();
    if (!like.defined() || like.strides() != strides) {
      // the gradient of a sum is one number, repeated
      if (std::all_of(strides.begin(), strides.end(), [](int64_t step) { return step == 0; }))
        from = grad.contiguous();
      if (!like.defined()) like = from;
    }
    if (like.strides() != from.strides() || !like.is_non_overlapping_and_dense()) return {};
    if (masked && read_x.defined()) return run_masked<T>(*program, from, read_x, read_y);
    Tensor out = at::empty_like(like);
    program->run(
        out.mutable_data_ptr<T>(), from.const_data_ptr<T>(),
        read_x.defined() ? read_x.const_data_ptr<T>() : nullptr,
        read_y.defined() ? read_y.const_data_ptr<T>() : nullptr, grad.numel());
    return out;
  }

  template <typename T>
  static void gate(T* to, const T* grad, const bool* passes, int64_t count) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    for (int64_t i = 0; i < count; ++i) {
      Bits bits;
      std::memcpy(&bits, grad + i, sizeof(T));
      bits &= -Bits(passes[i]);
      std::memcpy(to + i, &bits, sizeof(T));
    }
  }

  template <typename T>
  Tensor run_masked(const Program<T>& program, const Tensor& grad, const Tensor& mask, const Tensor& y) {
    Tensor out = at::empty_like(grad);
    T* to = out.mutable_data_ptr<T>();
    const T* from = grad.const_data_ptr<T>();
    const bool* passes = mask.const_data_ptr<bool>();
    const T* read_y = y.defined() ? y.const_data_ptr<T>() : nullptr;
    int64_t count = grad.numel();
    at::parallel_for(0, (count + CHUNK - 1) / CHUNK, SERIAL / CHUNK, [&](int64_t first, int64_t last) {
      int64_t start = first * CHUNK, n = std::min(last * CHUNK, count) - start;
      if (program.only_gates)
        gate(to + start, from + start, passes + start, n);
      else
        program.run(to + start, from + start, from + start, read_y ? read_y + start : nullptr, n, passes + start);
    });
    return out;
  }

  Tensor by_rule(const Tensor& grad) {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr node(torch::autograd::functionToPyObject(itself()));
    THPObjectPtr given(THPVariable_Wrap(grad));
    if (!node || !given) raise_python_error();
    PyObject* arguments[] = {node.get(), given.get()};
    THPObjectPtr result(PyObject_Vectorcall(python.gradient, arguments, 2, nullptr));
    if (!result) raise_python_error();
    return THPVariable_Unpack(result.get());
  }

  // Compiled autograd sees the node of the Python Function
  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    pybind11::gil_scoped_acquire gil;
    auto self = const_cast<Decoupled*>(this);
    THPObjectPtr node(torch::autograd::functionToPyObject(self->itself()));
    THPObjectPtr output(node ? PyObject_CallOneArg(python.stand_in, node.get()) : nullptr);
    if (!output) raise_python_error();
    python_node = THPVariable_Unpack(output.get()).grad_fn();
    python_node->compiled_args(args);
  }

  variable_list apply_with_saved(
      const variable_list& inputs, torch::autograd::SwapSavedVariables& saved) override {
    auto results = python_node->apply_with_saved(inputs, saved);
    python_node.reset();
    return results;
  }
};

Decoupled& node_of(PyObject* object) {
  return static_cast<Decoupled&>(*((torch::autograd::THPCppFunction*)object)->cdata);
}

// --- the attributes of a node that the Python Function has too ---

PyObject* get_call(PyObject* self, void*) {
  return Py_NewRef(node_of(self).site->call);
}

PyObject* get_needs(PyObject* self, void*) {
  auto& node = node_of(self);
  return Py_BuildValue(
      "(OO)", node.next_edge(0).is_valid() ? Py_True : Py_False, node.needs_gradient() ? Py_True : Py_False);
}

PyObject* get_like(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  auto& node = node_of(self);
  THPObjectPtr shape(PyTuple_New(Py_ssize_t(node.shape.size())));
  for (size_t i = 0; i < node.shape.size(); ++i)
    PyTuple_SET_ITEM(shape.get(), Py_ssize_t(i), PyLong_FromLongLong(node.shape[i]));
  return Py_BuildValue("(OO)", shape.get(), (PyObject*)torch::getTHPDtype(node.dtype));
  END_HANDLE_TH_ERRORS
}

PyObject* get_saved(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  variable_list found = node_of(self).saved();
  THPObjectPtr result(PyTuple_New(Py_ssize_t(found.size())));
  for (size_t i = 0; i < found.size(); ++i)
    PyTuple_SET_ITEM(result.get(), Py_ssize_t(i), THPVariable_Wrap(std::move(found[i])));
  return result.release();
  END_HANDLE_TH_ERRORS
}

using namespace torch::autograd;  // NOLINT: the macros need it

PyGetSetDef properties[] = {
    THP_FUNCTION_DEFAULT_PROPERTIES,
    {"call", get_call, nullptr, nullptr, nullptr},
    {"needs_input_grad", get_needs, nullptr, nullptr, nullptr},
    {"like", get_like, nullptr, nullptr, nullptr},
    {"saved_tensors", get_saved, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef methods[] = {
    {"_register_hook_dict", THPCppFunction_register_hook_dict, METH_O, nullptr},
    {"register_hook", THPCppFunction_register_hook, METH_O, nullptr},
    {"register_prehook", THPCppFunction_register_prehook, METH_O, nullptr},
    {"name", THPCppFunction_name, METH_NOARGS, nullptr},
    {"_sequence_nr", THPCppFunction_sequence_nr, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject node_type;

// --- the forward ---

// Gives an output its node. It has no history yet; that of `y`, if any, goes to the first edge.
void track(
    const Tensor& output, const Tensor& x, torch::autograd::edge_list&& edges, const std::shared_ptr<Site>& site,
    const Tensor& mask) {
  auto node = make_node<Decoupled>();
  node->set_next_edges(std::move(edges));
  node->site = site;
  node->shape = x.sizes();
  node->dtype = x.scalar_type();
  torch::autograd::set_history(output, node);
  if (site->x == MASK)
    node->x = SavedVariable(mask, /*is_output=*/false);
  else if (site->x)
    node->x = SavedVariable(site->x == INPUT ? x : output, /*is_output=*/site->x == OUTPUT);
  if (site->saves_y) node->y = SavedVariable(output, /*is_output=*/true);
}

// The output of `decoupled`; undefined if the tensors are not usual.
Tensor decoupled(const Tensor& y, const Tensor& x, const std::shared_ptr<Site>& site) {
  if (!is_plain(y) || !is_plain(x)) return {};
  Tensor mask;
  bool tracked = at::GradMode::is_enabled() && (x.requires_grad() || y.requires_grad());
  if (tracked && site->x == MASK && !(mask = mask_of(x, *site)).defined()) return {};
  Tensor output = y.detach();
  if (tracked) track(output, x, torch::autograd::collect_next_edges(y, x), site, mask);
  return output;
}

// A callable that generated code calls in the place of `ops.stop_gradient` or `ops.decoupled`.
struct Direct {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* usual;    // the Python function
  PyObject* resolve;  // returns the arguments of Site for keywords of `decoupled`, or None
  struct Entry {
    std::vector<pybind11::object> values;  // the keywords of a call: in generated code they are always the same objects
    std::shared_ptr<Site> site;            // null if Python has to answer
    pybind11::object name, rule;           // no name if the call gives the rule itself
  };
  std::unordered_map<size_t, Entry>* entries;
};

constexpr size_t MOST_ENTRIES = 10000;

void clear(Direct* self) {
  std::unordered_map<size_t, Direct::Entry> released;
  released.swap(*self->entries);
}

std::shared_ptr<Site> resolved(Direct* self, size_t key, PyObject* const* values, PyObject* names) {
  Direct::Entry entry;
  pybind11::dict given;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
    // An entry would keep the tensors of a container alive, which is a new one at every call
    bool holds = PyDict_Check(values[i]) || PyList_Check(values[i]) || PyTuple_CheckExact(values[i]);
    if (holds || THPVariable_Check(values[i])) return nullptr;
    auto value = pybind11::reinterpret_borrow<pybind11::object>(values[i]);
    PyObject* name = PyTuple_GET_ITEM(names, i);
    given[pybind11::handle(name)] = value;
    entry.values.push_back(value);
    if (PyUnicode_Compare(name, python.rule) == 0 && PyUnicode_Check(values[i])) entry.name = value;
  }
  entry.values.push_back(pybind11::reinterpret_borrow<pybind11::object>(names));
  auto got = pybind11::reinterpret_borrow<pybind11::object>(self->resolve)(given);
  if (!got.is_none()) {
    auto [call, x, saves_y, rule] = got.cast<std::tuple<pybind11::object, int, bool, pybind11::object>>();
    entry.site = std::make_shared<Site>(call.ptr(), x, saves_y);
    entry.rule = rule;
  }
  if (self->entries->size() >= MOST_ENTRIES) clear(self);  // the values differ at every call
  auto site = entry.site;
  (*self->entries)[key] = std::move(entry);
  return site;
}

// What the keywords of a call mean; null if Python has to answer.
std::shared_ptr<Site> find(Direct* self, PyObject* const* values, PyObject* names) {
  size_t count = size_t(PyTuple_GET_SIZE(names));
  size_t key = std::hash<PyObject*>()(names);
  for (size_t i = 0; i < count; ++i) key = (key ^ std::hash<PyObject*>()(values[i])) * 0x9E3779B97F4A7C15ULL;
  auto place = self->entries->find(key);
  if (place == self->entries->end()) return resolved(self, key, values, names);
  auto& entry = place->second;
  bool same = entry.values.size() == count + 1 && entry.values[count].ptr() == names;
  for (size_t i = 0; same && i < count; ++i) same = entry.values[i].ptr() == values[i];
  if (!same) return nullptr;
  auto site = entry.site;
  if (!site || !entry.name) return site;
  auto rule = entry.rule;
  THPObjectPtr now(PyObject_CallOneArg(python.get, entry.name.ptr()));
  if (now.get() == rule.ptr()) return site;
  PyErr_Clear();
  self->entries->erase(key);  // the rule was registered again
  return resolved(self, key, values, names);
}

PyObject* call_decoupled(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  auto self = (Direct*)object;
  if (PyVectorcall_NARGS(flags) == 2 && names && THPVariable_CheckExact(args[0]) &&
      THPVariable_CheckExact(args[1]) && at::GradMode::is_enabled() && runs_plainly() && rules_act() && is_unobserved()) {
    if (auto site = find(self, args + 2, names)) {
      Tensor output = decoupled(THPVariable_Unpack(args[0]), THPVariable_Unpack(args[1]), site);
      if (output.defined()) return THPVariable_Wrap(std::move(output));
    }
  }
  return PyObject_Vectorcall(self->usual, args, flags, names);
  END_HANDLE_TH_ERRORS
}

PyObject* call_stop(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  if (PyVectorcall_NARGS(flags) == 1 && !names && THPVariable_CheckExact(args[0]) &&
      at::GradMode::is_enabled() && runs_plainly() && rules_act())
    return THPVariable_Wrap(THPVariable_Unpack(args[0]).detach());
  return PyObject_Vectorcall(((Direct*)object)->usual, args, flags, names);
  END_HANDLE_TH_ERRORS
}

int traverse_direct(PyObject* object, visitproc visit, void* arg) {
  auto self = (Direct*)object;
  Py_VISIT(self->usual);
  Py_VISIT(self->resolve);
  for (auto& [key, entry] : *self->entries)
    for (auto& value : entry.values) Py_VISIT(value.ptr());
  return 0;
}

int clear_direct(PyObject* object) {
  clear((Direct*)object);
  return 0;
}

void free_direct(PyObject* object) {
  auto self = (Direct*)object;
  PyObject_GC_UnTrack(object);
  clear(self);
  delete self->entries;
  Py_XDECREF(self->usual);
  Py_XDECREF(self->resolve);
  PyObject_GC_Del(object);
}

PyTypeObject direct_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

pybind11::object make_direct(const pybind11::object& usual, const pybind11::object& resolve) {
  auto self = PyObject_GC_New(Direct, &direct_type);
  if (!self) throw pybind11::error_already_set();
  self->call = resolve.is_none() ? call_stop : call_decoupled;
  self->usual = Py_NewRef(usual.ptr());
  self->resolve = Py_NewRef(resolve.ptr());
  self->entries = new std::unordered_map<size_t, Direct::Entry>();
  PyObject_GC_Track((PyObject*)self);
  return pybind11::reinterpret_steal<pybind11::object>((PyObject*)self);
}

// --- a site that generated code calls once ---

// A callable of `x` that runs the operation and gives its result the node.
struct Fused {
  PyObject_HEAD
  vectorcallfunc call;
  bool is_step;         // whether the operation is the step of `vocabulary.heaviside`
  PyObject* operation;  // null for the identity
  PyObject* values;     // the arguments of the operation, a tuple, with None in the place of x
  PyObject* names;      // those of the last arguments, which are keywords; or null
  PyObject* usual;      // called with x if anything is unusual
  PyObject* around;     // called with y and x if y is unusual
  PyObject* resolve;    // returns the arguments of Site, or None
  PyObject* name;       // of the rule
  PyObject* rule;       // that the site has been made for, or null
  Py_ssize_t place;     // of x among the arguments
  std::shared_ptr<Site>* site;
};

constexpr Py_ssize_t MOST_ARGUMENTS = 8;

// The rule at the site, which can have been registered again; null if Python has to answer.
const std::shared_ptr<Site>& site_of(Fused* self) {
  THPObjectPtr now(PyObject_CallOneArg(python.get, self->name));
  if (!now) raise_python_error();
  if (now.get() != self->rule) {
    auto got = pybind11::reinterpret_borrow<pybind11::object>(self->resolve)();
    std::shared_ptr<Site> made;
    if (!got.is_none()) {
      auto [call, x, saves_y, rule] = got.cast<std::tuple<pybind11::object, int, bool, pybind11::object>>();
      made = std::make_shared<Site>(call.ptr(), x, saves_y);
    }
    Py_XSETREF(self->rule, now.release());
    *self->site = std::move(made);
  }
  return *self->site;
}

// The result of the operation, for which autograd does not look at x.
PyObject* run_below_autograd(Fused* self, PyObject* x) {
  PyObject* given[MOST_ARGUMENTS];
  Py_ssize_t count = PyTuple_GET_SIZE(self->values);
  for (Py_ssize_t i = 0; i < count; ++i) given[i] = PyTuple_GET_ITEM(self->values, i);
  given[self->place] = x;
  size_t positional = size_t(count - (self->names ? PyTuple_GET_SIZE(self->names) : 0));
  at::AutoDispatchBelowAutograd guard;
  at::AutoGradMode disabled(false);  // operations ask whether autograd records
  return PyObject_Vectorcall(self->operation, given, positional, self->names);
}

// The step as a program, because compilers make branches of a loop that tells NaN apart.
template <typename T>
Tensor step_of(const Tensor& x) {
  static const auto program = [] {
    auto made = std::make_unique<Program<T>>();
    made->constants.emplace_back().fill(T(0));
    made->steps = {{GT, 4, 1, 3, 3}, {EQ, 5, 1, 1, 1}, {WHERE, 6, 5, 4, 1}};  // 1 is x, 3 is 0
    made->results = 3;
    made->result = 6;
    return made;
  }();
  Tensor out = at::empty_like(x);
  const T* from = x.const_data_ptr<T>();
  program->run(out.mutable_data_ptr<T>(), from, from, nullptr, x.numel());
  return out;
}

// 1 where x is positive, else 0, in one pass; undefined if PyTorch's kernels have to compute it.
Tensor step(const Tensor& x) {
  if (!x.is_cpu() || !x.is_non_overlapping_and_dense() || (x.numel() > SERIAL && at::get_num_threads() > 1))
    return {};
  if (x.scalar_type() == at::kFloat) return step_of<float>(x);
  return x.scalar_type() == at::kDouble ? step_of<double>(x) : Tensor();
}

// Whether nobody else holds a result or its memory, so that it can get a history.
bool is_fresh(PyObject* object, const Tensor& tensor) {
  return Py_REFCNT(object) == 1 && tensor.use_count() == 1 && tensor.storage().use_count() == 1 &&
      !tensor.requires_grad() && !torch::autograd::impl::get_view_autograd_meta(tensor);
}

PyObject* call_fused(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  auto self = (Fused*)object;
  if (PyVectorcall_NARGS(flags) != 1 || names || !THPVariable_CheckExact(args[0]) || !at::GradMode::is_enabled() ||
      !runs_plainly() || !rules_act() || !is_unobserved())
    return PyObject_Vectorcall(self->usual, args, flags, names);
  const Tensor& x = THPVariable_Unpack(args[0]);
  std::shared_ptr<Site> site;
  if (x.requires_grad() && is_plain(x)) site = site_of(self);
  if (!site) return PyObject_Vectorcall(self->usual, args, flags, names);
  torch::autograd::edge_list edges{torch::autograd::Edge(), torch::autograd::impl::gradient_edge(x)};
  Tensor made = !self->operation ? x.detach() : self->is_step ? step(x) : Tensor();
  THPObjectPtr y(made.defined() ? THPVariable_Wrap(std::move(made)) : run_below_autograd(self, args[0]));
  if (!y) return nullptr;
  // The operation can have been changed to one that writes into x
  Tensor mask = site->x == MASK ? mask_of(x, *site) : Tensor();
  bool usual = THPVariable_CheckExact(y.get()) && is_plain(THPVariable_Unpack(y.get()));
  if (!usual || (site->x == MASK && !mask.defined())) {
    PyObject* both[] = {y.get(), args[0]};
    return PyObject_Vectorcall(self->around, both, 2, nullptr);
  }
  if (is_fresh(y.get(), THPVariable_Unpack(y.get()))) {
    track(THPVariable_Unpack(y.get()), x, std::move(edges), site, mask);
    return y.release();
  }
  Tensor output = THPVariable_Unpack(y.get()).detach();
  track(output, x, std::move(edges), site, mask);
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyObject* name_of_fused(PyObject*, void*) {
  return PyUnicode_FromString("site");
}

PyObject* module_of_fused(PyObject*, void*) {
  return PyUnicode_FromString("freegrad_fx");
}

// Generated code names the functions that it calls
PyGetSetDef names_of_fused[] = {
    {"__name__", name_of_fused, nullptr, nullptr, nullptr},
    {"__module__", module_of_fused, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

int traverse_fused(PyObject* object, visitproc visit, void* arg) {
  auto self = (Fused*)object;
  for (PyObject* held : {self->operation, self->values, self->names, self->usual, self->around, self->resolve,
                         self->name, self->rule})
    Py_VISIT(held);
  return 0;
}

int clear_fused(PyObject* object) {
  auto self = (Fused*)object;
  for (PyObject** held : {&self->operation, &self->values, &self->names, &self->usual, &self->around, &self->resolve,
                          &self->name, &self->rule})
    Py_CLEAR(*held);
  return 0;
}

void free_fused(PyObject* object) {
  PyObject_GC_UnTrack(object);
  clear_fused(object);
  delete ((Fused*)object)->site;
  PyObject_GC_Del(object);
}

PyTypeObject fused_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyObject* given(const pybind11::object& object) {
  return object.is_none() ? nullptr : Py_NewRef(object.ptr());
}

pybind11::object make_fused(
    const pybind11::object& operation, const pybind11::tuple& values, Py_ssize_t place, const pybind11::object& names,
    const pybind11::object& name, const pybind11::object& usual, const pybind11::object& around,
    const pybind11::object& resolve, bool is_step) {
  if (PyTuple_GET_SIZE(values.ptr()) > MOST_ARGUMENTS) return pybind11::none();
  auto self = PyObject_GC_New(Fused, &fused_type);
  if (!self) throw pybind11::error_already_set();
  self->call = call_fused;
  self->is_step = is_step;
  self->operation = given(operation);
  self->values = given(values);
  self->names = given(names);
  self->usual = given(usual);
  self->around = given(around);
  self->resolve = given(resolve);
  self->name = given(name);
  self->rule = nullptr;
  self->place = place;
  self->site = new std::shared_ptr<Site>();
  PyObject_GC_Track((PyObject*)self);
  return pybind11::reinterpret_steal<pybind11::object>((PyObject*)self);
}

// --- how a call of a model runs: asked once for all of its sites ---

// What has to be as it was when code was generated: tables without entries, entries of dicts, and attributes.
struct Kept {
  PyObject *tables, *holders, *names, *parts, *owners, *attributes, *values;  // lists

  bool is_kept() const {
    if (PyList_GET_SIZE(holders) != PyList_GET_SIZE(parts) || PyList_GET_SIZE(names) != PyList_GET_SIZE(parts) ||
        PyList_GET_SIZE(owners) != PyList_GET_SIZE(values) || PyList_GET_SIZE(attributes) != PyList_GET_SIZE(values))
      return false;  // another thread adds to them
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables); ++i) {
      int any = PyObject_IsTrue(PyList_GET_ITEM(tables, i));
      if (any < 0) raise_python_error();
      if (any) return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(parts); ++i) {
      PyObject* now = PyDict_GetItemWithError(PyList_GET_ITEM(holders, i), PyList_GET_ITEM(names, i));
      if (!now && PyErr_Occurred()) raise_python_error();
      if ((now ? now : Py_None) != PyList_GET_ITEM(parts, i)) return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(values); ++i) {
      THPObjectPtr now(PyObject_GetAttr(PyList_GET_ITEM(owners, i), PyList_GET_ITEM(attributes, i)));
      if (!now) raise_python_error();
      if (now.get() != PyList_GET_ITEM(values, i)) return false;
    }
    return true;
  }
};

// Returns the number of the version of a forward that a call runs at once; 0 if that has to be chosen.
struct Chooser {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* never;        // a tuple of functions that have to return something false
  PyObject* intercepted;  // asked once a block was entered
  Kept of_model, of_sites;
  PyObject *fused, *direct;  // the numbers
};

bool is_false(PyObject* asked) {
  THPObjectPtr got(PyObject_CallNoArgs(asked));
  int any = got ? PyObject_IsTrue(got.get()) : -1;
  if (any < 0) raise_python_error();
  return !any;
}

PyObject* call_chooser(PyObject* object, PyObject* const*, size_t, PyObject*) {
  HANDLE_TH_ERRORS
  auto self = (Chooser*)object;
  bool usual = true;
  for (Py_ssize_t i = 0; usual && i < PyTuple_GET_SIZE(self->never); ++i)
    usual = is_false(PyTuple_GET_ITEM(self->never, i));
  usual = usual && self->of_model.is_kept() && (PyList_GET_SIZE(python.used) == 0 || is_false(self->intercepted));
  if (!usual) return PyLong_FromLong(0);
  bool fused = at::GradMode::is_enabled() && runs_plainly() && rules_act() && is_unobserved() &&
      self->of_sites.is_kept();
  return Py_NewRef(fused ? self->fused : self->direct);
  END_HANDLE_TH_ERRORS
}

int traverse_chooser(PyObject* object, visitproc visit, void* arg) {
  auto self = (Chooser*)object;
  for (auto& kept : {self->of_model, self->of_sites})
    for (PyObject* held :
         {kept.tables, kept.holders, kept.names, kept.parts, kept.owners, kept.attributes, kept.values})
      Py_VISIT(held);
  for (PyObject* held : {self->never, self->intercepted, self->fused, self->direct}) Py_VISIT(held);
  return 0;
}

int clear_chooser(PyObject* object) {
  auto self = (Chooser*)object;
  for (Kept* kept : {&self->of_model, &self->of_sites})
    for (PyObject** held : {&kept->tables, &kept->holders, &kept->names, &kept->parts, &kept->owners,
                            &kept->attributes, &kept->values})
      Py_CLEAR(*held);
  for (PyObject** held : {&self->never, &self->intercepted, &self->fused, &self->direct}) Py_CLEAR(*held);
  return 0;
}

void free_chooser(PyObject* object) {
  PyObject_GC_UnTrack(object);
  clear_chooser(object);
  PyObject_GC_Del(object);
}

PyTypeObject chooser_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

using Lists = std::array<pybind11::list, 7>;

Kept kept(const Lists& lists) {
  std::array<PyObject*, 7> held;
  for (size_t i = 0; i < held.size(); ++i) held[i] = Py_NewRef(lists[i].ptr());
  return {held[0], held[1], held[2], held[3], held[4], held[5], held[6]};
}

pybind11::object make_chooser(
    const pybind11::tuple& never, const pybind11::object& intercepted, const Lists& of_model, const Lists& of_sites,
    const pybind11::object& fused, const pybind11::object& direct) {
  auto self = PyObject_GC_New(Chooser, &chooser_type);
  if (!self) throw pybind11::error_already_set();
  self->call = call_chooser;
  self->never = Py_NewRef(never.ptr());
  self->intercepted = Py_NewRef(intercepted.ptr());
  self->of_model = kept(of_model);
  self->of_sites = kept(of_sites);
  self->fused = Py_NewRef(fused.ptr());
  self->direct = Py_NewRef(direct.ptr());
  PyObject_GC_Track((PyObject*)self);
  return pybind11::reinterpret_steal<pybind11::object>((PyObject*)self);
}

// The members of a type whose objects are called, and hold objects.
template <typename T>
void make_callable(
    PyTypeObject& type, const char* name, traverseproc traverse, inquiry clear, destructor free,
    PyGetSetDef* properties = nullptr) {
  type.tp_name = name;
  type.tp_basicsize = sizeof(T);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC;
  type.tp_vectorcall_offset = offsetof(T, call);
  type.tp_call = PyVectorcall_Call;
  type.tp_traverse = traverse;
  type.tp_clear = clear;
  type.tp_dealloc = free;
  type.tp_getset = properties;
  if (PyType_Ready(&type) < 0) throw pybind11::error_already_set();
}

// `apply` of the Python Function for a rule without tensors among its parameters; None if it has to answer itself.
PyObject* apply(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count == 5 && THPVariable_CheckExact(args[0]) && THPVariable_CheckExact(args[1]) &&
      runs_plainly()) {
    auto site = std::make_shared<Site>(args[2], int(PyLong_AsLong(args[3])), args[4] == Py_True);
    Tensor output = decoupled(THPVariable_Unpack(args[0]), THPVariable_Unpack(args[1]), site);
    if (output.defined()) return THPVariable_Wrap(std::move(output));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// The result of a program, for contiguous tensors of its dtype.
template <typename T>
Tensor evaluate(const pybind11::object& given, const Tensor& grad, const Tensor& x, const Tensor& y) {
  Program<T> program;
  program.set(given);
  Tensor out = at::empty_like(grad);
  program.run(
      out.mutable_data_ptr<T>(), grad.const_data_ptr<T>(), x.const_data_ptr<T>(), y.const_data_ptr<T>(), grad.numel());
  return out;
}

PyMethodDef apply_method = {"apply", (PyCFunction)(void (*)(void))apply, METH_FASTCALL, nullptr};

}  // namespace

PYBIND11_MODULE(freegrad_fx_node, module) {
  make_callable<Direct>(direct_type, "freegrad_fx.Direct", traverse_direct, clear_direct, free_direct);
  make_callable<Fused>(fused_type, "freegrad_fx.Fused", traverse_fused, clear_fused, free_fused, names_of_fused);
  make_callable<Chooser>(chooser_type, "freegrad_fx.Chooser", traverse_chooser, clear_chooser, free_chooser);
  if (!torch::autograd::_initFunctionPyTypeObject(node_type, "_DecoupledBackward", properties, methods))
    throw pybind11::error_already_set();
  torch::autograd::registerCppFunction(typeid(Decoupled), &node_type);
  python.explicit_ = PyUnicode_InternFromString("explicit");
  python.blocks = PyUnicode_InternFromString("blocks");
  python.rule = PyUnicode_InternFromString("rule");
  python.observers = PyUnicode_InternFromString("observers");
  module.def(
      "configure",
      [](pybind11::object used, pybind11::object state, pybind11::object entered, pybind11::object observed,
         pybind11::object thread, pybind11::object get,
         pybind11::object gradient, pybind11::object program, pybind11::object stand_in) {
        python.used = used.release().ptr();
        python.state = state.release().ptr();
        python.entered = entered.release().ptr();
        python.observed = observed.release().ptr();
        python.thread = thread.release().ptr();
        python.get = get.release().ptr();
        python.gradient = gradient.release().ptr();
        python.program = program.release().ptr();
        python.stand_in = stand_in.release().ptr();
      });
  module.attr("Node") = pybind11::handle((PyObject*)&node_type);
  module.def("direct", make_direct);
  module.def("fused", make_fused);
  module.def("chooser", make_chooser);
  module.def("evaluate", [](const pybind11::object& program, const Tensor& grad, const Tensor& x, const Tensor& y) {
    return grad.scalar_type() == at::kFloat ? evaluate<float>(program, grad, x, y)
                                            : evaluate<double>(program, grad, x, y);
  });
  module.add_object("apply", pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&apply_method, nullptr)));
}
