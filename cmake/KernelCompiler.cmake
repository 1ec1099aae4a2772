# Finds NVRTC. Sets NSA_SEL_HAS_KERNELS, and with it nsa_sel_nvrtc (the library), nsa_sel_nvrtc_version and
# nsa_sel_cuda_include; or NSA_SEL_NO_KERNELS_REASON, one line that build_info() repeats.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

set(NSA_SEL_HAS_KERNELS OFF)
if(NSA_SEL_WITHOUT_KERNELS)
  set(NSA_SEL_NO_KERNELS_REASON "built with NSA_SEL_WITHOUT_KERNELS=ON")
else()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvrtc.py" find
    OUTPUT_VARIABLE nsa_sel_found
    ERROR_VARIABLE nsa_sel_why
    RESULT_VARIABLE nsa_sel_failed
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE
  )
  if(nsa_sel_failed)
    string(REGEX REPLACE "[\n\"\\;]" " " nsa_sel_why "${nsa_sel_why}")
    set(NSA_SEL_NO_KERNELS_REASON
        "expected NVRTC 12.9 (nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12, nvidia-cuda-cccl-cu12) or another when the package was built, got none: ${nsa_sel_why}"
    )
  else()
    set(NSA_SEL_HAS_KERNELS ON)
    string(REPLACE "\n" ";" nsa_sel_found "${nsa_sel_found}")
    list(POP_FRONT nsa_sel_found nsa_sel_nvrtc nsa_sel_nvrtc_version)
    set(nsa_sel_cuda_include "${nsa_sel_found}")
    message(STATUS "NVRTC ${nsa_sel_nvrtc_version}: ${nsa_sel_nvrtc}; headers: ${nsa_sel_cuda_include}")
  endif()
endif()

if(NOT NSA_SEL_HAS_KERNELS)
  if(NSA_SEL_REQUIRE_KERNELS)
    message(FATAL_ERROR "NSA_SEL_REQUIRE_KERNELS: ${NSA_SEL_NO_KERNELS_REASON}")
  endif()
  message(WARNING "nsa_sel is built without CUDA kernels: ${NSA_SEL_NO_KERNELS_REASON}")
endif()
