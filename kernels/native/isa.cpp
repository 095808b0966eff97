#include "isa.h"

#include <cstring>
#include <initializer_list>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace chipbus {

namespace {

#if defined(__x86_64__)

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// Linux keeps tile registers off until a process asks for them; children inherit the permission, threads share it.
bool request_amx() {
    if (!has_avx512_bf16()) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Whether the tiles multiply as the manual says, on whole numbers whose sums are exact in any order. Hypervisors and
// kernels have been wrong about AMX; a chip that is not sure computes with AVX-512 instead.
bool tiles_agree() {
    constexpr int kRows = 17, kInner = 96;
    static uint16_t x[kRows * kInner], w[kInner * kPanel], found[kRows * kPanel], expected[kRows * kPanel];
    const auto small = [](int number) {  // a whole number from -4 to 4, as bf16
        const float value = static_cast<float>(number * 7 % 9 - 4);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return static_cast<uint16_t>(bits >> 16);
    };
    for (int i = 0; i < kRows * kInner; ++i) x[i] = small(i);
    for (int i = 0; i < kInner * kPanel; ++i) w[i] = small(i + i / 64);
    Task task{};
    task.dtype = kBfloat16;
    task.rows = kRows;
    task.columns = kPanel;
    task.inner = kInner;
    task.settings[2] = kWeightsBfloat16;
    task.args[0] = {reinterpret_cast<char*>(x), 2 * kInner};
    task.args[1] = {reinterpret_cast<char*>(w), 2 * kInner * kPanel};
    Scratch scratch;
    const Window window{kRows, 0, 0};
    task.args[4] = {reinterpret_cast<char*>(expected), 2 * kPanel};
    kEmulatedAmxKernels.run[kLinear](task, window, scratch);
    task.args[4].data = reinterpret_cast<char*>(found);
    kAmxKernels.run[kLinear](task, window, scratch);
    return std::memcmp(found, expected, sizeof found) == 0;
}

bool has_amx() {
    static const bool granted = request_amx() && tiles_agree();
    return granted;
}

#endif

}  // namespace

const KernelSet* find_kernels(const char* name, const char** why) {
    *why = "";
#if defined(__x86_64__)
    __builtin_cpu_init();
    struct Level {
        const KernelSet* kernels;
        bool (*is_there)();
        const char* why;
    };
    static const Level levels[] = {
        {&kAmxKernels, has_amx, "this processor or its kernel has no AMX tiles for bfloat16, or they multiply wrongly"},
        {&kAvx512Bf16Kernels, has_avx512_bf16, "this processor has no AVX-512 with BF16 and VNNI"},
        {&kAvx512Kernels, has_avx512, "this processor has no AVX-512 (F, BW, VL, DQ)"},
        {&kAvx2Kernels, has_avx2, "this processor has no AVX2 with FMA"},
        {&kEmulatedAmxKernels, has_avx512_bf16, "emulated AMX needs AVX-512 with BF16 and VNNI"},
    };
    for (const Level& level : levels) {
        if (std::strcmp(level.kernels->name, name) != 0) continue;
        if (level.is_there()) return level.kernels;
        *why = level.why;
        return nullptr;
    }
#endif
    *why = "no kernels of that name";
    return nullptr;
}

const char* best_isa() {
    const char* why = "";
    for (const char* name : {"amx", "avx512bf16", "avx512", "avx2"})
        if (find_kernels(name, &why) != nullptr) return name;
    return "";
}

}  // namespace chipbus
