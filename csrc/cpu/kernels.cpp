// The table of this instruction set's kernels.
#include "ops.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace LLAMA2RT_ISA {
extern const Kernels table;
const Kernels table = {TEXT(LLAMA2RT_ISA),
                       rms_norm,
                       rms_norm_backward,
                       swiglu,
                       swiglu_backward,
                       rope,
                       attention,
                       attention_backward,
                       decode_attention,
                       token_logprob,
                       token_logprob_backward,
                       add_to,
                       linear,
                       blocked_linear,
                       weight_gradient,
                       pack_weight,
                       packed_linear,
                       forward_pass,
                       sample};
}  // namespace LLAMA2RT_ISA
