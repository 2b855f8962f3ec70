//! What is refused, and that it is refused in words.

use latentc_codegen::cube::{LaunchShape, WgpuDevice, cuda_source};
use latentc_codegen::device::{Data, Device};
use latentc_codegen::program::{Kernel, KernelKind};

use crate::bench::{device, gpu, kernel, map};

const TWICE: &str = "axes a0=n0\nparam p0: f32[a0]\ny: f32[a0] = add p0, p0\nreturn y";

#[test]
fn grids_of_two_dimensions() {
    if let Some(mut device) = device() {
        two_dimensions(&mut device);
    }
    if let Some(mut gpu) = gpu() {
        two_dimensions(&mut gpu);
    }
}

fn two_dimensions(device: &mut impl Device) {
    let k = map("twice", TWICE);
    let n = 65535 * 256 + 300;
    assert_eq!(LaunchShape::of(&k).grid(|_| n), Ok((65535, 2, 1)));
    let x = device.upload(latentc_ir::DType::F32, Data::F32((0..n).map(|i| i as f32).collect())).unwrap();
    let mut y = device.alloc(latentc_ir::DType::F32, n).unwrap();
    device.launch(&k, &[Some(&x)], &mut y, &[n]).unwrap();
    let Data::F32(y) = device.read(&y, n).unwrap() else { panic!("not floats") };
    assert!(y.iter().enumerate().all(|(i, &y)| y == 2.0 * i as f32));

    let k =
        map("sums", "axes a0=n0, a1=40\nparam p0: f32[a0, a1]\ny: f32[a0] = reduce_sum p0 over a1\nreturn y");
    let rows = 65535 + 70;
    let x = vec![0.5; rows * 40];
    let x = device.upload(latentc_ir::DType::F32, Data::F32(x)).unwrap();
    let mut y = device.alloc(latentc_ir::DType::F32, rows).unwrap();
    device.launch(&k, &[Some(&x)], &mut y, &[rows]).unwrap();
    let Data::F32(y) = device.read(&y, rows).unwrap() else { panic!("not floats") };
    assert!(y.iter().all(|&y| y == 20.0));
}

#[test]
fn launches_that_do_not_fit() {
    let Some(mut device) = device() else { return };
    let k = map("twice", TWICE);
    let f32 = latentc_ir::DType::F32;
    let x = device.upload(f32, Data::F32(vec![1.0; 8])).unwrap();
    let mut y = device.alloc(f32, 8).unwrap();
    let mut why = |inputs: &[Option<&_>], sizes: &[usize]| {
        device.launch(&k, inputs, &mut y, sizes).unwrap_err().to_string()
    };
    assert_eq!(why(&[Some(&x)], &[9]), "kernel twice: `p0` has 9 elements of f32, the buffer 8 of f32");
    assert_eq!(why(&[None], &[8]), "kernel twice: an input is missing");
    assert_eq!(why(&[], &[8]), "kernel twice: 0 buffers and 1 sizes, not 1 and 1");
    assert_eq!(
        why(&[Some(&x)], &[1 << 33]),
        "kernel twice: 33554432 cubes of 256 units are more than 32 bits can number"
    );
    let small = device.upload(latentc_ir::DType::I32, Data::I32(vec![1; 8])).unwrap();
    let why = device.launch(&k, &[Some(&small)], &mut y, &[8]).unwrap_err().to_string();
    assert_eq!(why, "kernel twice: `p0` has 8 elements of f32, the buffer 8 of i32");
    assert!(
        device
            .alloc(f32, 1 << 40)
            .unwrap_err()
            .to_string()
            .starts_with("no memory for 1099511627776 elements of f32")
    );
    assert!(device.alloc(latentc_ir::DType::F64, 1).is_err());
    assert!(device.upload(f32, Data::I32(vec![1])).is_err());
    assert!(device.read(&x, 9).is_err());
    assert_eq!(device.read(&x, 0).unwrap(), Data::F32(vec![]));
    // And still it runs.
    device.launch(&k, &[Some(&x)], &mut y, &[8]).unwrap();
    assert_eq!(device.read(&y, 3).unwrap(), Data::F32(vec![2.0; 3]));
}

#[test]
fn bodies_that_make_no_kernel() {
    let why = |k: &Kernel| cuda_source(k).unwrap_err().to_string();
    let wide = "axes a0=n0\nparam p0: f64[a0]\ny: f32[a0] = cast p0\nreturn y";
    assert_eq!(why(&map("wide", wide)), "kernel wide: `p0` is f64, which CUDA C++ kernels cannot hold");
    assert_eq!(why(&kernel(KernelKind::Contract, "sum", TWICE)), "kernel sum: a product has a `contract`");
    let soft = "axes a0=n0\nparam p0: f32[a0]\ny: f32[a0] = softmax p0 over a0\nreturn y";
    assert_eq!(why(&map("soft", soft)), "kernel soft: `softmax` is no part of a map");
    let mut k = map("twice", TWICE);
    k.name = "no name".to_owned();
    assert_eq!(why(&k), "kernel no name: `no name` is no name for a function in CUDA C++");
    let mut k = map("twice", TWICE);
    k.body.body[0].args[0] = latentc_ir::ValueId(9);
    assert_eq!(why(&k), "kernel twice: value 9 is used before it is made");
    let long = (1..500).map(|n| {
        format!("x{n}: f32[a0] = neg {}\n", if n == 1 { "p0".to_owned() } else { format!("x{}", n - 1) })
    });
    let long = format!("axes a0=n0\nparam p0: f32[a0]\n{}return x499", long.collect::<String>());
    assert_eq!(why(&map("long", &long)), "kernel long: more than 400 operations hang below one another");
}

#[test]
fn two_kernels_of_one_name() {
    let Some(mut device): Option<WgpuDevice> = device() else { return };
    let f32 = latentc_ir::DType::F32;
    let x = device.upload(f32, Data::F32(vec![3.0])).unwrap();
    let mut y = device.alloc(f32, 1).unwrap();
    for (op, want) in [("add", 6.0), ("mul", 9.0), ("add", 6.0)] {
        let k = map("same", &TWICE.replace("add", op));
        device.launch(&k, &[Some(&x)], &mut y, &[1]).unwrap();
        assert_eq!(device.read(&y, 1).unwrap(), Data::F32(vec![want]));
    }
}
