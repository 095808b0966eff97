// Runs the tests of the native engine that need no Python: built with sanitizers by tests/native/Makefile.
#include <chrono>
#include <cstdio>
#include <exception>

#include "support.h"

namespace chipbus::tests {

std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

}  // namespace chipbus::tests

int main() {
    using chipbus::tests::all_tests;
    int failed = 0;
    for (const auto& test : all_tests()) {
        const auto began = std::chrono::steady_clock::now();
        try {
            test.run();
            std::printf("passed  %6.2f s  %s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(), test.name);
        } catch (const std::exception& error) {
            std::printf("FAILED  %s\n        %s\n", test.name, error.what());
            ++failed;
        }
        std::fflush(stdout);
    }
    std::printf("%zu tests, %d failed; instruction sets:", all_tests().size(), failed);
    chipbus::tests::each_isa([](const chipbus::KernelSet& kernels) { std::printf(" %s", kernels.name); });
    std::printf("\n");
    return failed == 0 && !all_tests().empty() ? 0 : 1;
}
