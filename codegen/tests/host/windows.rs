//! Windows of a buffer: what is written to one is read from the others, and a launch may not read what it writes unless it can.

use latentc_codegen::device::{Data, Device};
use latentc_codegen::host::{Buffer, Host};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::DType;

/// `y = x + z`, and the sum of neighbours.
fn kernels() -> [Kernel; 2] {
    let body = |text: &str| {
        let text = format!("module m entry @k\n\nfunc @k {{\n{text}}}\n");
        let module = latentc_ir::check("m.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()));
        Kernel { name: "k".to_owned(), kind: KernelKind::Map, body: module.functions[0].clone() }
    };
    [
        body(
            "  axes a=4\n  param x: f32[a=4]\n  param z: f32[a=4]\n\n  y: f32[a=4] = add x, z\n  return y\n",
        ),
        body(
            "  axes a=4, b=2, c=2\n  param x: f32[a=4]\n  param z: f32[a=4]\n\n  s: f32[b=2, c=2] = split x axis a into b, c\n  \
              r: f32[b=2] = reduce_sum s over c\n  t: f32[b=2, c=2] = broadcast r over c\n  \
              m: f32[a=4] = merge t axes b, c into a\n  y: f32[a=4] = add m, z\n  return y\n",
        ),
    ]
}

#[test]
fn what_a_launch_writes_is_no_part_of_what_it_reads() {
    let mut host = Host::new();
    let numbers: Vec<f32> = (0..12).map(|n| n as f32).collect();
    let all = host.upload(DType::F32, Data::F32(numbers)).expect("there is room");
    let window = |host: &mut Host, start: usize| host.window(&all, start..start + 4).expect("it is inside");
    let (low, mut shifted, mut same) = (window(&mut host, 0), window(&mut host, 2), window(&mut host, 0));
    let high = window(&mut host, 8);
    let [sum, neighbours] = kernels();
    let mut launch = |kernel: &Kernel, out: &mut Buffer| {
        let done = host.launch(kernel, &[Some(&low), Some(&high)], out, &[]);
        done.map_err(|e| e.to_string()).and_then(|()| host.read(&all, 12).map_err(|e| e.to_string()))
    };
    // In the place of an operand that each element is read of at its own index.
    let want = [8.0, 10.0, 12.0, 14.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0];
    assert_eq!(launch(&sum, &mut same), Ok(Data::F32(want.to_vec())));
    let why = launch(&sum, &mut shifted).expect_err("it begins between");
    assert_eq!(why, "kernel k: the output has elements of an input");
    let why = launch(&neighbours, &mut same).expect_err("neighbours are read too late");
    assert_eq!(why, "kernel k: its result may not take the place of what it is given");
    assert!(host.window(&high, 1..6).is_none());
}
