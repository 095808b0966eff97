// The extension module chipbus.kernels._native: cores, graphs and packing for Python. No logic of its own.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "cores.h"
#include "isa.h"
#include "mapping.h"
#include "packing.h"
#include "search.h"

namespace py = pybind11;
using namespace py::literals;

namespace chipbus {

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

char* at(uint64_t address) { return reinterpret_cast<char*>(address); }

std::string why_not(const std::string& isa) {
    const char* why = "";
    find_kernels(isa.c_str(), &why);
    return why;
}

std::unique_ptr<Cores> make_cores(int threads, const std::string& isa) {
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; there must be at least 1");
    const char* why = "";
    const KernelSet* kernels = find_kernels(isa.c_str(), &why);
    if (kernels == nullptr) throw std::invalid_argument("instruction set '" + isa + "': " + why);
    return std::make_unique<Cores>(threads, *kernels);
}

// tasks: bytes of Task structures, as kernels/native/graph.py lays them out.
std::unique_ptr<Graph> make_graph(const Array<uint8_t>& tasks, const Array<int32_t>& successors) {
    if (static_cast<size_t>(tasks.nbytes()) % sizeof(Task) != 0) throw std::invalid_argument("tasks are not whole");
    std::vector<Task> copied(static_cast<size_t>(tasks.nbytes()) / sizeof(Task));
    std::memcpy(copied.data(), tasks.data(), static_cast<size_t>(tasks.nbytes()));
    return std::make_unique<Graph>(std::move(copied), std::vector<int32_t>(successors.data(), successors.data() + successors.size()));
}

int32_t run(Cores& cores, Graph& graph, int32_t tokens, int32_t rows, int32_t stores, bool check) {
    const py::gil_scoped_release released;
    return cores.run(graph, Window{tokens, rows, stores}, check, nullptr);
}

py::tuple run_timed(Cores& cores, Graph& graph, int32_t tokens, int32_t rows, int32_t stores, bool check) {
    const auto count = static_cast<py::ssize_t>(graph.tasks().size());
    Array<int64_t> begins(count), ends(count);
    Array<int32_t> where(count);
    const Timeline timeline{begins.mutable_data(), ends.mutable_data(), where.mutable_data()};
    int32_t failed = -1;
    {
        const py::gil_scoped_release released;
        failed = cores.run(graph, Window{tokens, rows, stores}, check, &timeline);
    }
    return py::make_tuple(failed, begins, ends, where);
}

std::vector<std::pair<int64_t, int64_t>> counters(const Cores& cores) {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int core = 0; core < cores.threads(); ++core) found.emplace_back(cores.counters(core).tasks, cores.counters(core).busy_ns);
    return found;
}

void translate(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
    }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native tile engine: see kernels/native.";
    module.attr("PANEL") = kPanel;
    module.attr("GROUP") = kGroup;
    module.attr("MAX_HEAD_DIM") = kMaxHeadDim;
    module.attr("TASK_BYTES") = sizeof(Task);
    module.attr("KERNELS") = std::vector<std::string>{"load_rows", "rotary_table", "rms_norm", "linear", "rotate_and_store", "paged_attention", "store_rows"};
    module.attr("HUGE_PAGE") = kHugePage;
    py::register_local_exception_translator(&translate);
    module.def("best_isa", &best_isa, "The best instruction set of this processor, '' if none will do.");
    module.def("why_not", &why_not, "isa"_a, "Why this machine cannot run an instruction set; '' if it can.");

    py::class_<Graph>(module, "Graph").def(py::init(&make_graph), "tasks"_a, "successors"_a).def("__len__", [](const Graph& graph) { return graph.tasks().size(); });

    py::class_<Cores>(module, "Cores")
        .def(py::init(&make_cores), "threads"_a, "isa"_a)
        .def_property_readonly("threads", &Cores::threads)
        .def_property_readonly("isa", &Cores::isa)
        .def_property_readonly("ended", &Cores::ended, "Tasks and packing jobs ended so far; any thread may look while another runs a graph.")
        .def("run", &run, "graph"_a, "tokens"_a, "rows"_a, "stores"_a, "check"_a)
        .def("run_timed", &run_timed, "graph"_a, "tokens"_a, "rows"_a, "stores"_a, "check"_a)
        .def("counters", &counters, "(tasks, ns busy) of each core since it was made.")
        .def("pack_panels", [](Cores& cores, uint64_t matrix, int64_t columns, int64_t inner, int item, uint64_t packed) { pack_panels(cores, at(matrix), columns, inner, item, at(packed)); },
             "matrix"_a, "columns"_a, "inner"_a, "item"_a, "packed"_a, py::call_guard<py::gil_scoped_release>())
        .def("pack_int8",
             [](Cores& cores, uint64_t matrix, int64_t columns, int64_t inner, bool is_wide, uint64_t packed, uint64_t scales, uint64_t sums) {
                 pack_int8(cores, at(matrix), columns, inner, is_wide, at(packed), reinterpret_cast<float*>(at(scales)), reinterpret_cast<int32_t*>(at(sums)));
             },
             "matrix"_a, "columns"_a, "inner"_a, "is_wide"_a, "packed"_a, "scales"_a, "sums"_a, py::call_guard<py::gil_scoped_release>())
        .def("read", [](Cores& cores, uint64_t memory, int64_t bytes) { return read_all(cores, at(memory), bytes); }, "memory"_a, "bytes"_a,
             "Read memory on all cores and compute nothing: seconds.", py::call_guard<py::gil_scoped_release>())
        .def("largest",
             [](Cores& cores, uint64_t values, int64_t row_bytes, const std::vector<int64_t>& rows, int64_t columns) {
                 const py::gil_scoped_release released;
                 return largest(cores, at(values), row_bytes, rows, columns);
             },
             "values"_a, "row_bytes"_a, "rows"_a, "columns"_a, "Index of the largest fp32 value of each row, the lowest among equals.");

    py::class_<Mapping>(module, "Mapping")
        .def(py::init<int, size_t, bool>(), "file"_a, "bytes"_a, "is_writable"_a)
        .def_property_readonly("address", [](const Mapping& mapping) { return reinterpret_cast<uint64_t>(mapping.begin()); })
        .def("take_huge_pages", &Mapping::take_huge_pages, "cores"_a, py::call_guard<py::gil_scoped_release>())
        .def("make_read_only", &Mapping::make_read_only);

    module.def("top", [](const Array<float>& values, int64_t count) { return top(values.data(), values.size(), count); }, "values"_a, "count"_a,
               "Indices of the largest values, largest first, the lower index first among equals.");
}

}  // namespace chipbus
