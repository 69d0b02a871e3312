"""How far a smaller deep block's predictions are from its teacher's, on the same tokens (train.target=student)."""

import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.flow.starflow import FlowOutput, STARFlow, apply_flow
from starflow_jax.model.student import Deep, flow_of


def differences(flow: STARFlow, teacher: Deep, out: FlowOutput, token_grid: tuple[int, int], text: jax.Array | None
                ) -> dict[str, jax.Array]:
    """Means over all elements of all tokens, in nats per dimension: {"mean_error": half the squared difference of the
    means in units of the teacher's scale, "scale_error": the squared difference of the log-scales}. To second order
    their sum is the divergence KL(teacher's || student's) of each token given those before it.

    out: of the student's flow. No gradient goes into the teacher.
    """
    u_BTSK, z, logdet = out.block_outputs[-2], out.z_BTSK.reshape(out.logdets[-1].shape), out.logdets[-1]
    teacher_z, teacher_logdet = lax.stop_gradient(apply_flow(
        flow_of(flow.config, teacher), {"params": {"deep": teacher}}, STARFlow.deep_forward, u_BTSK, token_grid, text))
    log_ratio = teacher_logdet - logdet  # of the student's scale to the teacher's
    # u = mu + sigma z in both, so that (mu_teacher - mu_student) / sigma_teacher is this difference.
    means = jnp.exp(log_ratio) * z - teacher_z.reshape(z.shape)
    return {"mean_error": 0.5 * jnp.mean(means**2), "scale_error": jnp.mean(log_ratio**2)}
