//! What is kept from run to run is held in as many bits as its type has: what is appended is rounded to it, whatever it was computed with.

use half::{bf16, f16};
use latentc_codegen::device::{Data, Device};
use latentc_codegen::host::Host;
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{DType, Function, Op, Size, Type};

/// Appends rows of two numbers.
fn append(dtype: DType) -> Kernel {
    let mut f = Function::new("append");
    let t = f.add_axis("t", Size::Sym("n0".into()), None);
    let s = f.add_axis("s", Size::Sym("n1".into()), None);
    let d = f.add_axis("d", Size::Fixed(2), None);
    let cache = f.add_param("p0", Type::new(dtype, vec![s, d]));
    let x = f.add_param("p1", Type::new(dtype, vec![t, d]));
    let at = f.add_param("p2", Type::new(DType::I32, vec![t]));
    let ty = Type::new(dtype, vec![s, d]);
    f.results = f.push(Op::Append { from: t, to: s }, &[cache, x, at], &[("", ty)]);
    Kernel { name: "append".into(), kind: KernelKind::Map, body: f }
}

#[test]
fn what_is_appended_is_rounded_to_the_type_of_the_cache() {
    // Below and above the middle of two numbers, a tie, and what is no number of f16's.
    let x = [1.0039, -1.0041, 2.0f32.powi(-9) + 1.0, 70_000.0];
    let as_bf16 = |x: f32| bf16::from_f32(x).to_f32();
    let as_f16 = |x: f32| f16::from_f32(x).to_f32();
    let forms: [(DType, &dyn Fn(f32) -> f32); 3] =
        [(DType::F32, &|x| x), (DType::Bf16, &as_bf16), (DType::F16, &as_f16)];
    for (dtype, held) in forms {
        let mut host = Host::new();
        let (rows, places) = (Data::F32(x.to_vec()), Data::I32(vec![3, 1]));
        let rows = host.upload(dtype, rows).expect("memory");
        let places = host.upload(DType::I32, places).expect("memory");
        // There is room for more positions than are read.
        let mut cache = host.keep(dtype, 12).expect("memory");
        let inputs = [None, Some(&rows), Some(&places)];
        let kernel = append(dtype);
        let sizes: Vec<usize> =
            kernel.size_symbols().iter().map(|s| if *s == "n0" { 2 } else { 5 }).collect();
        host.launch(&kernel, &inputs, &mut cache, &sizes).expect("both have a place");
        let [a, b, c, d] = x.map(held);
        let want = vec![0.0, 0.0, c, d, 0.0, 0.0, a, b, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(host.read(&cache, 12).expect("it is there"), Data::F32(want), "{dtype}");
        // A window of it is as narrow.
        let window = host.window(&cache, 6..8).expect("it is inside");
        assert_eq!(host.read(&window, 2).expect("it is there"), Data::F32(vec![a, b]), "{dtype}");
    }
}
