//! Prints the rates of the kernels beside the limits of this machine:
//! `cargo bench -p muster-kernels --bench kernels -- [THREADS]... [KERNEL]... [ISA]...`, where KERNEL is linear, head,
//! ffn, quantised, combine, attention or latent. Without arguments: one thread and two, every kernel, the best
//! instruction set.
//!
//! Shapes are those of a model of hidden size 1024 with 32 experts of width 512, eight per token, and a head of
//! 49,155 tokens. Weights are cold: calls go round more of them than caches hold, except where it says warm.

#![allow(clippy::print_stdout)] // the figures are the product

mod roofline;

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Instant;

use muster_kernels::{
    AttentionShape, Cpu, Expert, ExpertRows, FfnScratch, Isa, KvCache, KvShape, KvSlot, KvValues, Matrix,
    Outputs, attention, combine, combine_to_wire, grouped_ffn, linear,
};
use muster_types::{Compute, DType, Packing, Reach, Term};
use roofline::Roofline;

/// Seconds of the fastest of some calls.
fn best(cpu: &Cpu, mut call: impl FnMut()) -> f64 {
    let started = Instant::now();
    let (mut best, mut calls) = (f64::INFINITY, 0);
    while started.elapsed().as_secs_f64() < 0.4 || calls < 3 {
        let before = seconds(cpu.threads());
        call();
        best = best.min(seconds(cpu.threads()) - before);
        calls += 1;
    }
    best
}

/// Seconds of a clock. For one thread it is the thread's CPU time, so that other load on the machine shows less.
fn seconds(threads: usize) -> f64 {
    let clock = if threads == 1 { libc::CLOCK_THREAD_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time to a valid place.
    assert_eq!(unsafe { libc::clock_gettime(clock, &raw mut now) }, 0, "the clock can be read");
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1021) as f32 / 1021.0 - 0.5).collect()
}

fn bf16(len: usize) -> Vec<u16> {
    let mut out = vec![0; len];
    muster_kernels::to_bf16(&numbers(len), &mut out);
    out
}

/// Prints one line: rates and their shares of the limits.
fn report(what: &str, line: &Roofline, compute: Compute, flop: f64, bytes: f64, seconds: f64) {
    let (rate, read) = (flop / seconds, bytes / seconds);
    println!(
        "{what:58} {:7.1} GFLOP/s ({:5.1} %) {:6.1} GB/s ({:5.1} %)",
        rate / 1e9,
        100.0 * rate / line.compute(compute),
        read / 1e9,
        100.0 * read / line.read,
    );
}

fn name(compute: Compute) -> &'static str {
    match compute {
        Compute::F32 => "f32",
        Compute::Bf16 => "bf16",
        Compute::Bf16Pairs => "bf16-pairs",
    }
}

const MODES: [Compute; 2] = [Compute::Bf16, Compute::Bf16Pairs];

fn linears(cpu: &Cpu, line: &Roofline, n: usize, k: usize) {
    let copies = ((256 << 20) / (n * k * 2)).max(2);
    let w = bf16(n * k);
    let weights: Vec<_> = (0..copies).map(|_| Matrix::pack_bf16(n, k, &w).expect("the shape fits")).collect();
    for compute in MODES {
        for rows in [1, 2, 4, 8, 32, 64, 512] {
            let (mut x, mut out) = (numbers(rows * k), vec![0.0; rows * n]);
            muster_kernels::round_bf16(&mut x);
            let mut index = 0;
            let cold = best(cpu, || {
                index = (index + 1) % copies;
                linear(cpu, &weights[index], black_box(&x), compute, &mut out);
            });
            let what = format!("linear [{n}, {k}] {}, {rows} rows", name(compute));
            report(&what, line, compute, (2 * rows * n * k) as f64, (n * k * 2) as f64, cold);
            if rows >= 64 && n * k <= 4 << 20 {
                let warm = best(cpu, || linear(cpu, &weights[0], black_box(&x), compute, &mut out));
                let what = format!("{what}, warm");
                report(&what, line, compute, (2 * rows * n * k) as f64, (n * k * 2) as f64, warm);
            }
        }
    }
}

fn ffns(cpu: &Cpu, line: &Roofline) {
    const HIDDEN: usize = 1024;
    const WIDTH: usize = 512;
    const EXPERTS: usize = 32;
    const PICKED: usize = 8;
    const LAYERS: usize = 4;
    let pack = |n, k| Matrix::pack_bf16(n, k, &bf16(n * k)).expect("the shape fits");
    let expert = || Expert::new(pack(WIDTH, HIDDEN), pack(WIDTH, HIDDEN), pack(HIDDEN, WIDTH));
    let layers: Vec<Vec<_>> =
        (0..LAYERS).map(|_| (0..EXPERTS).map(|_| expert().expect("the shapes fit")).collect()).collect();
    let mut scratch = FfnScratch::default();
    for compute in MODES {
        for tokens in [1, 8, 16, 32, 64, 128, 512] {
            let mut x = numbers(tokens * HIDDEN);
            muster_kernels::round_bf16(&mut x);
            // Token t goes to experts t * 8, t * 8 + 1 and so on, modulo their number: as even as it can be.
            let mut rows = vec![Vec::new(); EXPERTS];
            for token in 0..tokens {
                for pick in 0..PICKED {
                    rows[(token * PICKED + pick) % EXPERTS].push(token as u32);
                }
            }
            let used = rows.iter().filter(|rows| !rows.is_empty()).count();
            let mut out = vec![0.0; tokens * PICKED * HIDDEN];
            let mut layer = 0;
            let time = best(cpu, || {
                layer = (layer + 1) % LAYERS;
                let groups: Vec<_> = layers[layer]
                    .iter()
                    .zip(&rows)
                    .filter(|(_, rows)| !rows.is_empty())
                    .map(|(expert, rows)| ExpertRows { expert, rows })
                    .collect();
                grouped_ffn(cpu, &groups, black_box(&x), compute, &mut scratch, &mut out);
            });
            let per_expert = tokens * PICKED / used;
            let what =
                format!("ffn {}, {tokens} tokens: {used} experts, {per_expert} rows each", name(compute));
            let flop = (2 * 3 * tokens * PICKED * HIDDEN * WIDTH) as f64;
            report(&what, line, compute, flop, (used * 3 * HIDDEN * WIDTH * 2) as f64, time);
        }
    }
}

/// Experts in bf16, in MXFP4, in bytes and in nibbles side by side, out of more than any cache holds.
fn quantised(cpu: &Cpu, hidden: usize, intermediate: usize) {
    type Pack<'a> = &'a dyn Fn(usize, usize) -> Matrix;
    let few = |kind, n, k| Matrix::round_bf16(kind, n, k, &bf16(n * k)).expect("the shape fits");
    let wide = |n, k| Matrix::pack_bf16(n, k, &bf16(n * k)).expect("the shape fits");
    let mxfp4 = |n, k| {
        let codes: Vec<u8> = (0..n * k / 2).map(|i| ((i * 2_654_435_761) >> 16) as u8).collect();
        Matrix::pack_mxfp4(n, k, &codes, &vec![123; n * k / 32]).expect("the shape fits")
    };
    let packs: [(&str, Compute, Pack<'_>); 6] = [
        ("bf16", Compute::Bf16, &wide),
        ("mxfp4", Compute::Bf16, &mxfp4),
        ("bf16 in pairs", Compute::Bf16Pairs, &wide),
        ("mxfp4 in pairs", Compute::Bf16Pairs, &mxfp4),
        ("q8", Compute::Bf16, &|n, k| few(Packing::Q8, n, k)),
        ("q4", Compute::Bf16, &|n, k| few(Packing::Q4, n, k)),
    ];
    let (h, i) = (hidden, intermediate);
    for (name, compute, pack) in packs {
        let expert = || Expert::new(pack(i, h), pack(i, h), pack(h, i)).expect("the shapes fit");
        let first = expert();
        let count = ((256 << 20) / first.bytes()).next_multiple_of(8);
        let experts: Vec<_> = std::iter::once(first).chain((1..count).map(|_| expert())).collect();
        let mut scratch = FfnScratch::default();
        for rows in [1, 2, 4, 8, 12, 32, 128] {
            let picked: Vec<u32> = (0..rows).collect();
            let mut x = numbers(rows as usize * hidden);
            muster_kernels::round_bf16(&mut x);
            let mut out = vec![0.0; 8 * x.len()];
            let mut first = 0;
            let time = best(cpu, || {
                first = (first + 8) % count;
                let groups: Vec<_> = experts[first..first + 8]
                    .iter()
                    .map(|expert| ExpertRows { expert, rows: &picked })
                    .collect();
                grouped_ffn(cpu, &groups, black_box(&x), compute, &mut scratch, &mut out);
            });
            let flop = (2 * 3 * 8 * hidden * intermediate) as f64 * f64::from(rows);
            println!(
                "8 of {count} experts [{h}, {i}] {name:14}, {rows:3} rows each: {:7.1} us {:7.1} GFLOP/s {:6.1} GB/s",
                time * 1e6,
                flop / time / 1e9,
                (8 * experts[0].bytes()) as f64 / time / 1e9
            );
        }
    }
}

/// Weighted sums of eight experts' outputs, warm, and of one row per worker; to f32 as in a router, and to the wire as
/// in a worker.
fn combines(cpu: &Cpu) {
    const HIDDEN: usize = 1024;
    for (rows, terms) in [(1, 8), (8, 8), (64, 8), (512, 8), (8, 2), (512, 1)] {
        let x = numbers(rows * terms * HIDDEN);
        let sources = [Outputs::Computed(&x, DType::Bf16)];
        let starts: Vec<u32> = (0..=rows).map(|row| (row * terms) as u32).collect();
        let of: Vec<Term> =
            (0..rows * terms).map(|row| Term { source: 0, row: row as u32, weight: 0.125 }).collect();
        let (mut sums, mut wire) = (vec![0.0; rows * HIDDEN], vec![0; rows * HIDDEN * 2]);
        let here = best(cpu, || {
            combine(cpu, HIDDEN, black_box(&sources), &starts, &of, &mut sums).expect("they are finite");
        });
        let sent = best(cpu, || {
            combine_to_wire(cpu, HIDDEN, black_box(&sources), &starts, &of, DType::Bf16, &mut wire)
                .expect("they are finite");
        });
        println!(
            "combine {rows:3} rows of {terms} terms: {:8.2} us, to bf16 {:8.2} us",
            here * 1e6,
            sent * 1e6
        );
    }
}

fn attentions(cpu: &Cpu) {
    let (heads, kv_heads, head_dim, context) = (32, 8, 128, 4096_u32);
    let shape = KvShape { layers: 1, kv_heads, head_dim, value_dim: head_dim, values: KvValues::Apart };
    let blocks: Vec<u32> = (0..context / 16).collect();
    let mut kv = KvCache::new(shape, blocks.len(), Compute::Bf16).expect("the shape fits");
    let slots: Vec<_> = (0..context).map(|position| KvSlot { position, blocks: &blocks }).collect();
    let x = numbers(context as usize * kv_heads * head_dim);
    kv.write(0, &slots, &x, &x);
    let (value_dim, scale) = (head_dim, 0.088);
    let shape =
        AttentionShape { heads, kv_heads, head_dim, value_dim, scale, reach: Reach::All, sinks: None };
    for rows in [1, 16] {
        let slots = &slots[slots.len() - rows..];
        let q = numbers(rows * heads * head_dim);
        let mut out = vec![0.0; q.len()];
        let time = best(cpu, || attention(cpu, &shape, 0, black_box(&q), slots, &kv, &mut out));
        println!(
            "attention over {context} positions, {rows:2} rows: {:6.1} GFLOP/s {:6.1} GB/s",
            (4 * rows * heads * head_dim * context as usize) as f64 / time / 1e9,
            (rows * kv.bytes()) as f64 / time / 1e9
        );
    }
}

/// Attention over compressed rows: the last 512 of 576 elements of the only key are its value.
fn latents(cpu: &Cpu) {
    let (head_dim, value_dim, context) = (576, 512, 4096_u32);
    let blocks: Vec<u32> = (0..context / 16).collect();
    let slots: Vec<_> = (0..context).map(|position| KvSlot { position, blocks: &blocks }).collect();
    let k = numbers(context as usize * head_dim);
    let caches = [KvValues::Apart, KvValues::EndOfKey].map(|values| {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim, value_dim, values };
        let mut kv = KvCache::new(shape, blocks.len(), Compute::Bf16).expect("the shape fits");
        let ends = k.chunks_exact(head_dim).flat_map(|key| &key[head_dim - value_dim..]).copied();
        let v: Vec<f32> = if values == KvValues::Apart { ends.collect() } else { Vec::new() };
        kv.write(0, &slots, &k, &v);
        kv
    });
    for (heads, rows) in [(16, 1), (16, 64), (128, 1), (128, 8)] {
        let shape = AttentionShape {
            heads,
            kv_heads: 1,
            head_dim,
            value_dim,
            scale: 0.04,
            reach: Reach::All,
            sinks: None,
        };
        let slots = &slots[slots.len() - rows..];
        let (q, mut out) = (numbers(rows * heads * head_dim), vec![0.0; rows * heads * value_dim]);
        for kv in &caches {
            let time = best(cpu, || attention(cpu, &shape, 0, black_box(&q), slots, kv, &mut out));
            println!(
                "attention over {context} compressed rows, {heads:3} heads, {rows:2} rows, values {:8}: {:7.1} us {:6.1} GFLOP/s",
                format!("{:?}", kv.shape().values),
                time * 1e6,
                (2 * rows * heads * (head_dim + value_dim) * context as usize) as f64 / time / 1e9,
            );
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let mut threads: Vec<NonZeroUsize> =
        arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    if threads.is_empty() {
        threads = [1, 2].into_iter().filter_map(NonZeroUsize::new).collect();
    }
    let mut sets: Vec<Isa> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    if sets.is_empty() {
        sets.push(Isa::detect());
    }
    let known = ["linear", "head", "ffn", "quantised", "combine", "attention", "latent"];
    let names: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| known.contains(name)).collect();
    let wanted = |name: &str| names.is_empty() || names.contains(&name);
    for (&threads, &isa) in threads.iter().flat_map(|threads| sets.iter().map(move |isa| (threads, isa))) {
        let cpu = Cpu::with_isa(threads, isa).expect("the set is available");
        let line = Roofline::measure(threads.get());
        let rate =
            |rate: Option<f64>| rate.map_or("none".to_owned(), |rate| format!("{:.1} GFLOP/s", rate / 1e9));
        println!(
            "{isa}, {threads} thread(s). At most: read {:.1} GB/s, fma {}, vdpbf16ps {}, tdpbf16ps {}",
            line.read / 1e9,
            rate(Some(line.fma)),
            rate(line.pairs),
            rate(line.tiles),
        );
        if wanted("linear") {
            linears(&cpu, &line, 1024, 1024);
        }
        if wanted("head") {
            linears(&cpu, &line, 49_155, 1024);
        }
        if wanted("ffn") {
            ffns(&cpu, &line);
        }
        if wanted("quantised") {
            quantised(&cpu, 1024, 512);
        }
        if wanted("combine") {
            combines(&cpu);
        }
        if wanted("attention") {
            attentions(&cpu);
        }
        if wanted("latent") {
            latents(&cpu);
        }
    }
}
