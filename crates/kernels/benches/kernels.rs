//! Prints what the kernels reach on this machine: `cargo bench -p muster-kernels --bench kernels -- [THREADS] [KERNEL]`,
//! where KERNEL is linear, ffn, quantised or attention.

#![allow(clippy::print_stdout)] // the figures are the product

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Instant;

use muster_kernels::{
    AttentionShape, Cpu, Expert, ExpertRows, FfnScratch, Isa, KvCache, KvShape, KvSlot, Matrix, Precision,
    Quantisation, attention, grouped_ffn, linear,
};

/// Seconds of the fastest of some calls.
fn best(mut call: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = f64::INFINITY;
    while started.elapsed().as_secs_f64() < 0.4 {
        let call_started = Instant::now();
        call();
        best = best.min(call_started.elapsed().as_secs_f64());
    }
    best
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1021) as f32 / 1021.0 - 0.5).collect()
}

fn bf16(len: usize) -> Vec<u16> {
    let mut out = vec![0; len];
    muster_kernels::to_bf16(&numbers(len), &mut out);
    out
}

fn linears(cpu: &Cpu, n: usize, k: usize) {
    // As many copies as no cache holds, so that one row streams from memory.
    let copies = (256 << 20) / (n * k * 2);
    let w = bf16(n * k);
    let weights: Vec<_> = (0..copies).map(|_| Matrix::pack_bf16(n, k, &w).expect("the shape fits")).collect();
    for rows in [1, 2, 4, 8, 64, 512] {
        let (x, mut out) = (numbers(rows * k), vec![0.0; rows * n]);
        let mut index = 0;
        let cold = best(|| {
            index = (index + 1) % copies;
            linear(cpu, &weights[index], black_box(&x), &mut out);
        });
        let warm = best(|| linear(cpu, &weights[0], black_box(&x), &mut out));
        let (flop, bytes) = ((2 * rows * n * k) as f64, (n * k * 2) as f64);
        println!(
            "linear [{n}, {k}] bf16, {rows:3} rows: {:7.1} GFLOP/s {:6.1} GB/s cold, {:7.1} GFLOP/s {:6.1} GB/s warm",
            flop / cold / 1e9,
            bytes / cold / 1e9,
            flop / warm / 1e9,
            bytes / warm / 1e9,
        );
    }
}

fn ffns(cpu: &Cpu, hidden: usize, intermediate: usize) {
    let pack = |n, k| Matrix::pack_bf16(n, k, &bf16(n * k)).expect("the shape fits");
    let expert =
        || Expert::new(pack(intermediate, hidden), pack(intermediate, hidden), pack(hidden, intermediate));
    let experts: Vec<_> = (0..8).map(|_| expert().expect("the shapes fit")).collect();
    let bytes: usize = experts.iter().map(Expert::bytes).sum();
    let mut scratch = FfnScratch::default();
    for rows in [1, 4, 32] {
        let picked: Vec<u32> = (0..rows).collect();
        let groups: Vec<_> = experts.iter().map(|expert| ExpertRows { expert, rows: &picked }).collect();
        let x = numbers(rows as usize * hidden);
        let mut out = vec![0.0; groups.len() * x.len()];
        let time = best(|| grouped_ffn(cpu, &groups, black_box(&x), Precision::Bf16, &mut scratch, &mut out));
        let flop = (2 * 3 * groups.len() * hidden * intermediate) as f64 * f64::from(rows);
        println!(
            "8 experts [{hidden}, {intermediate}] bf16, {rows:2} rows each: {:6.1} GFLOP/s {:6.1} GB/s",
            flop / time / 1e9,
            bytes as f64 / time / 1e9
        );
    }
}

/// Experts in bf16, in bytes and in nibbles side by side, out of as many as no cache holds.
fn quantised(cpu: &Cpu, hidden: usize, intermediate: usize) {
    type Pack<'a> = &'a dyn Fn(usize, usize) -> Matrix;
    let few = |kind, n, k| Matrix::quantise_bf16(kind, n, k, &bf16(n * k)).expect("the shape fits");
    let packs: [(&str, Pack<'_>); 3] = [
        ("bf16", &|n, k| Matrix::pack_bf16(n, k, &bf16(n * k)).expect("the shape fits")),
        ("q8", &|n, k| few(Quantisation::Q8, n, k)),
        ("q4", &|n, k| few(Quantisation::Q4, n, k)),
    ];
    let (h, i) = (hidden, intermediate);
    for (name, pack) in packs {
        let expert = || Expert::new(pack(i, h), pack(i, h), pack(h, i)).expect("the shapes fit");
        let first = expert();
        let count = ((256 << 20) / first.bytes()).next_multiple_of(8);
        let experts: Vec<_> = std::iter::once(first).chain((1..count).map(|_| expert())).collect();
        let mut scratch = FfnScratch::default();
        for rows in [1, 4, 32, 128] {
            let picked: Vec<u32> = (0..rows).collect();
            let x = numbers(rows as usize * hidden);
            let mut out = vec![0.0; 8 * x.len()];
            let mut first = 0;
            let time = best(|| {
                first = (first + 8) % count;
                let groups: Vec<_> = experts[first..first + 8]
                    .iter()
                    .map(|expert| ExpertRows { expert, rows: &picked })
                    .collect();
                grouped_ffn(cpu, &groups, black_box(&x), Precision::Bf16, &mut scratch, &mut out);
            });
            let flop = (2 * 3 * 8 * hidden * intermediate) as f64 * f64::from(rows);
            println!(
                "8 of {count} experts [{h}, {i}] {name:4}, {rows:3} rows each: {:7.1} us {:7.1} GFLOP/s {:6.1} GB/s",
                time * 1e6,
                flop / time / 1e9,
                (8 * experts[0].bytes()) as f64 / time / 1e9
            );
        }
    }
}

fn attentions(cpu: &Cpu) {
    let (heads, kv_heads, head_dim, context) = (32, 8, 128, 4096_u32);
    let shape = KvShape { layers: 1, kv_heads, head_dim };
    let blocks: Vec<u32> = (0..context / 16).collect();
    let mut kv = KvCache::new(shape, blocks.len(), Precision::Bf16).expect("the shape fits");
    let slots: Vec<_> = (0..context).map(|position| KvSlot { position, blocks: &blocks }).collect();
    let x = numbers(context as usize * kv_heads * head_dim);
    kv.write(0, &slots, &x, &x);
    let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.088, window: None };
    for rows in [1, 16] {
        let slots = &slots[slots.len() - rows..];
        let q = numbers(rows * heads * head_dim);
        let mut out = vec![0.0; q.len()];
        let time = best(|| attention(cpu, &shape, 0, black_box(&q), slots, &kv, &mut out));
        println!(
            "attention over {context} positions, {rows:2} rows: {:6.1} GFLOP/s {:6.1} GB/s",
            (4 * rows * heads * head_dim * context as usize) as f64 / time / 1e9,
            (rows * kv.bytes()) as f64 / time / 1e9
        );
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let threads = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(NonZeroUsize::MIN);
    let names: Vec<&String> =
        arguments.iter().filter(|argument| argument.parse::<usize>().is_err()).collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| *wanted == name);
    for isa in Isa::available().into_iter().rev().filter(|&isa| isa != Isa::Portable) {
        let cpu = Cpu::with_isa(threads, isa).expect("the set is available");
        println!("{isa}, {threads} thread(s)");
        if wanted("linear") {
            linears(&cpu, 1024, 1024);
            linears(&cpu, 4096, 4096);
        }
        if wanted("ffn") {
            ffns(&cpu, 2048, 768);
        }
        if wanted("quantised") {
            quantised(&cpu, 1024, 512);
            quantised(&cpu, 4096, 1536);
        }
        if wanted("attention") {
            attentions(&cpu);
        }
    }
}
