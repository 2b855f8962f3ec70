//! Weights in the tensors of a checkpoint: shapes, copies, and the inventory of a program.

use std::collections::BTreeMap;

use latentc_ir::{Layout, Module, check};

const MODEL: &str = r#"module model entry @main

func @attend {
  axes t, i=3, n=2, v=4, c=5, e=2, f=3
  param x: f32[t, c=5]
  weight W_UK: f32[i=3, n=2, c=5] = "kv_b.weight"[i * (n | v), c]
  weight W_UV: f32[i=3, v=4, c=5] = "kv_b.weight"[i * (n | v), c]
  weight W_T: f32[c=5, i=3, n=2] = "q.weight"[i * n, c]
  weight W_E: f32[e=2, f=3, c=5] = "experts.{e}.up.weight"[f, c]
  weight W_S: f32[f=3, e=2, c=5] = "experts.{e}.up.weight"[f, c]
  weight W_M: f32[f=3, c=5] = "shared.weight"[f, c]
  weight W_P: f32[n=2, c=5] = "part.weight"[(n | v), c]
  weight b: f32 = "bias"

  k: f32[t, i=3, n=2] = contract W_UK, x over c
  o: f32[t, i=3, v=4] = contract W_UV, x over c
  return k, o
}

func @main {
  axes t, i=3, n=2, v=4, c=5, w=10
  param x: f32[t, c=5]
  weight E: f32[w=10, c=5] = "embed.weight"[w, c]
  weight H: f32[c=5, w=10] = "embed.weight"[w, c]

  k: f32[t, i=3, n=2], o: f32[t, i=3, v=4] = call @attend(x) under "layers.0"
  k2: f32[t, i=3, n=2], o2: f32[t, i=3, v=4] = call @attend(x) under "layers.1"
  y: f32[w=10, t] = contract x, E over c
  return k, o, k2, o2, y
}
"#;

fn model() -> Module {
    check("test.ir", MODEL).unwrap_or_else(|e| panic!("{}", e.render()))
}

fn layout(weight: &str) -> Layout {
    let m = model();
    let f = m.functions.iter().find(|f| f.value_named(weight).is_some()).unwrap();
    let id = f.value_named(weight).unwrap();
    let w = f.weights.iter().find(|w| w.value == id).unwrap();
    w.stored.layout(f, f.ty(id)).unwrap()
}

/// The spans of the first piece as (weight, stored, length).
fn spans(weight: &str) -> Vec<(u64, u64, u64)> {
    let l = layout(weight);
    l.spans(&l.pieces[0]).map(|s| (s.weight, s.stored, s.len)).collect()
}

#[test]
fn spans_are_as_long_as_both_orders_allow() {
    assert_eq!(spans("W_UK"), [(0, 0, 10), (10, 30, 10), (20, 60, 10)]);
    assert_eq!(spans("W_UV"), [(0, 10, 20), (20, 40, 20), (40, 70, 20)]);
    assert_eq!(spans("W_M"), [(0, 0, 15)]);
    assert_eq!(spans("b"), [(0, 0, 1)]);
    assert_eq!(spans("W_E"), [(0, 0, 15)]);
    assert_eq!(spans("W_S"), [(0, 0, 5), (10, 5, 5), (20, 10, 5)]);
    assert_eq!(spans("W_T").len(), 30);
    assert_eq!(spans("W_T")[..3], [(0, 0, 1), (6, 1, 1), (12, 2, 1)]);

    let identity = |w| layout(w).is_identity();
    assert!(identity("W_M") && identity("b") && identity("E"));
    assert!(!(identity("W_UK") || identity("W_T") || identity("W_E") || identity("W_P") || identity("H")));
    let names: Vec<_> = layout("W_E").pieces.into_iter().map(|p| (p.tensor, p.index, p.start)).collect();
    assert_eq!(
        names,
        [("experts.0.up.weight".to_owned(), vec![0], 0), ("experts.1.up.weight".to_owned(), vec![1], 15)]
    );
}

#[test]
fn save_and_load_are_inverse() {
    for weight in ["W_UK", "W_UV", "W_T", "W_E", "W_S", "W_M", "W_P", "b", "E", "H"] {
        let l = layout(weight);
        let original: Vec<u32> = (1..=l.elements as u32).collect();
        let bytes: Vec<u8> = original.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut elements = vec![0u32; original.len()];
        let mut raw = vec![0u8; bytes.len()];
        for piece in &l.pieces {
            let mut stored = vec![0u32; l.stored_elements() as usize];
            l.save(piece, 1, &original, &mut stored).unwrap();
            l.load(piece, 1, &stored, &mut elements).unwrap();
            let mut stored_raw = vec![0u8; stored.len() * 4];
            l.save(piece, 4, &bytes, &mut stored_raw).unwrap();
            l.load(piece, 4, &stored_raw, &mut raw).unwrap();
            let as_bytes: Vec<u8> = stored.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(stored_raw, as_bytes, "{weight}");
        }
        assert_eq!((elements, raw), (original, bytes), "{weight}");
    }
    let l = layout("W_M");
    let error = l.load(&l.pieces[0], 1, &[0u8; 3], &mut [0u8; 15]).unwrap_err();
    assert_eq!(error, "\"shared.weight\": lengths 3 stored and 15 in the weight, the layout has 15 and 15");
}

#[test]
fn an_inventory_lists_tensors_in_order_of_use() {
    let inventory = model().inventory().unwrap();
    let names: Vec<_> = inventory.tensors.iter().map(|t| t.name.as_str()).collect();
    let layer = [
        "kv_b.weight",
        "q.weight",
        "experts.0.up.weight",
        "experts.1.up.weight",
        "shared.weight",
        "part.weight",
        "bias",
    ];
    let mut expected: Vec<_> = layer.iter().map(|n| format!("layers.0.{n}")).collect();
    expected.extend(layer.iter().map(|n| format!("layers.1.{n}")));
    expected.push("embed.weight".to_owned());
    assert_eq!(names, expected);

    let kv = inventory.tensor("layers.1.kv_b.weight").unwrap();
    assert_eq!((&kv.shape[..], kv.uses.len(), kv.unread), (&[18, 5][..], 2, 0));
    let part = inventory.tensor("layers.1.part.weight").unwrap();
    assert_eq!((part.elements(), part.unread), (30, 20));
    let unread: BTreeMap<_, _> =
        inventory.tensors.iter().filter(|t| t.unread > 0).map(|t| (t.name.as_str(), t.unread)).collect();
    assert_eq!(unread.len(), 2);
    assert_eq!(inventory.elements(), 2 * (90 + 30 + 15 + 15 + 15 + 30 + 1) + 50);
}

#[test]
fn weights_must_agree_on_a_tensor() {
    let m = check("test.ir", &MODEL.replace("H: f32[c=5, w=10]", "H: bf16[c=5, w=10]")).unwrap();
    assert_eq!(
        m.inventory().unwrap_err(),
        "@main: H: \"embed.weight\" is bf16[10, 5] here and f32[10, 5] elsewhere"
    );
}
