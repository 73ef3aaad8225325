/* A signal frame as the kernel builds one on x86-64 (arch/x86/include/asm/sigframe.h,
 * arch/x86/include/uapi/asm/sigcontext.h): returning through it puts back all of a thread's user state.
 */
#ifndef PH_SIGFRAME_H
#define PH_SIGFRAME_H

#include "ph_tracer.h"

/* Room for a frame with the largest extended state, 64-byte aligned. */
#define PH_FRAME_SIZE (512 + PH_XSTATE_MAX + 64)

/* Build the frame of `state` into `frame`, to stand at `address` in the task (64-byte aligned), whose handler
   "returns" to `restorer`. Returns the number of bytes used. */
size_t ph_build_frame (const struct ph_thread_state *state, uint64_t address, uint64_t restorer, void *frame);

#endif
