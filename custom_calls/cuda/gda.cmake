# lamina_jax._gda_calls: channels of GPU-initiated RDMA. include() this where nvcc is there; nothing here needs a GPU or
# a NIC, nor rdma-core, to be built.
set(gda_dir ${CMAKE_CURRENT_LIST_DIR})
get_filename_component(gda_custom_calls ${gda_dir} DIRECTORY)

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(lamina_gda_kernels STATIC ${gda_dir}/gda_kernels.cu)
set_target_properties(lamina_gda_kernels PROPERTIES
  POSITION_INDEPENDENT_CODE ON CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
target_include_directories(lamina_gda_kernels PRIVATE ${gda_custom_calls} ${gda_dir})
# Functions of message.h are constexpr and know nothing of CUDA. 20014: a kernel's Block is for the device only.
target_compile_options(lamina_gda_kernels PRIVATE --expt-relaxed-constexpr -diag-suppress 20014)

set(gda_sources gda_end.cc gda_failure.cc gda_ffi_handlers.cc gda_module.cc gda_proxy_thread.cc)
list(TRANSFORM gda_sources PREPEND ${gda_dir}/)
list(APPEND gda_sources ${gda_custom_calls}/wording.cc)
nanobind_add_module(_gda_calls NB_STATIC ${gda_sources})
target_include_directories(_gda_calls PRIVATE ${gda_custom_calls} ${gda_dir})
target_include_directories(_gda_calls SYSTEM PRIVATE ${XLA_FFI_INCLUDE_DIR})
target_compile_options(_gda_calls PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror>)
target_link_libraries(_gda_calls PRIVATE
  lamina_gda_kernels CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})

install(TARGETS _gda_calls LIBRARY DESTINATION lamina_jax)
