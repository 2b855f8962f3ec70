//! The gated MLP: arXiv 2002.05202, section 2.

use latentc_frontend::spec;

spec! {
    /// `W_2 (silu(W_1 u) * W_3 u)`
    pub fn swiglu(hidden: usize, width: usize)(u[t,d]) -> y[t,d] {
        axes { each b; t; d = hidden; f = width }
        weights {
            W_1[f,d] = "gate_proj.weight"[f, d];
            W_3[f,d] = "up_proj.weight"[f, d];
            W_2[d,f] = "down_proj.weight"[d, f];
        }
        y_1[t,f] = W_1[f,d] * u[t,d];
        y_3[t,f] = W_3[f,d] * u[t,d];
        z[t,f]   = silu(y_1[t,f]) * y_3[t,f];
        y[t,d]   = W_2[d,f] * z[t,f];
    }
}
