//! The canonical order on tiles: one `tdpbf16ps` adds one block of K to sixteen rows times sixteen outputs.
//!
//! What must hold: the walk loads and stores only memory that its slices cover, and gives the canonical order with any
//! [`Tiles`] that keeps its contract. There are two: the hardware's, and one in plain Rust, on which tests run the same
//! walk. It does not know where results go.

use std::marker::PhantomData;

use crate::pairs::{DotOrder, PairRows, PairWork, Paired};
use crate::panels::{Bf16Block, Block};
use crate::simd::{LANES, Simd};
use crate::tile::{Sink, panels_at};

/// Eight tile registers of up to sixteen rows of 64 bytes: 0..4 hold totals, 4 inputs, 5 inputs or weights, 6 and 7
/// weights.
pub(crate) trait Tiles {
    /// Registers 0..=4 get `rows` rows (1 to 16), the others sixteen. Their content is unspecified.
    ///
    /// # Safety
    /// The machine must have what the implementation needs.
    unsafe fn configure(rows: usize) -> Self;
    /// Register `T` becomes zero.
    fn zero<const T: usize>(&mut self);
    /// Register `T` takes its rows from `from`, `stride` bytes apart.
    ///
    /// # Safety
    /// 64 bytes must be readable for every row of the register.
    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize);
    /// Adds the products of inputs `A` and weights `B` to totals `C`: even and odd products apart, then their sum, all
    /// flushed.
    fn multiply<const C: usize, const A: usize, const B: usize>(&mut self);
    /// Writes the rows of register `T` to the first rows of `to`.
    fn store<const T: usize>(&mut self, to: &mut [[f32; LANES]; LANES]);
}

/// The canonical order by way of tiles.
pub(crate) struct InTiles<T>(PhantomData<fn() -> T>);

impl<T> InTiles<T> {
    /// # Safety
    /// The machine must have what `T` needs.
    pub(crate) unsafe fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T> Clone for InTiles<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for InTiles<T> {}

impl<T: Tiles> DotOrder for InTiles<T> {
    #[inline(always)]
    fn run<S: Simd, W: Paired, K: Sink<M>, const M: usize>(self, s: S, work: &PairWork<'_, W, K, M>) {
        let rows = work.rows.len().min(LANES);
        if rows == 0 {
            return;
        }
        // SAFETY: the contract of `new` holds: the machine has what `T` needs.
        let walk = &mut Walk { tiles: unsafe { T::configure(rows) }, rows, totals: Totals::default() };
        let mut panel = work.panels.start;
        let end = work.panels.end;
        if work.rows.len() <= LANES {
            // One tile of inputs: many panels share its loads and keep several streams of weights going.
            while M == 1 && panel + 4 <= end {
                walk.inputs_by_panels::<S, W, K, M, 1, 4, 4>(s, work, work.rows.start, panel);
                panel += 4;
            }
            while M == 2 && panel + 2 <= end {
                walk.inputs_by_panels::<S, W, K, M, 1, 2, 4>(s, work, work.rows.start, panel);
                panel += 2;
            }
            while panel < end {
                if M == 1 {
                    walk.inputs_by_panels::<S, W, K, M, 1, 1, 1>(s, work, work.rows.start, panel);
                } else {
                    walk.inputs_by_panels::<S, W, K, M, 1, 1, 2>(s, work, work.rows.start, panel);
                }
                panel += 1;
            }
            return;
        }
        while M == 1 && panel + 2 <= end {
            walk.rows_by_panels::<S, W, K, M, 2, 2>(s, work, panel);
            panel += 2;
        }
        while panel < end {
            if M == 1 {
                walk.rows_by_panels::<S, W, K, M, 1, 1>(s, work, panel);
            } else {
                walk.rows_by_panels::<S, W, K, M, 1, 2>(s, work, panel);
            }
            panel += 1;
        }
    }
}

/// Up to four tiles of totals on their way from registers to the sink.
#[derive(Default)]
#[repr(align(64))]
struct Totals([[[f32; LANES]; LANES]; 4]);

struct Walk<T> {
    tiles: T,
    /// Rows of a tile of inputs.
    rows: usize,
    totals: Totals,
}

impl<T: Tiles> Walk<T> {
    /// All rows times `C` panels of each matrix, which are `B` tiles of weights; two tiles of inputs at a time.
    #[inline(always)]
    fn rows_by_panels<S: Simd, W: Paired, K: Sink<M>, const M: usize, const C: usize, const B: usize>(
        &mut self,
        s: S,
        work: &PairWork<'_, W, K, M>,
        panel: usize,
    ) {
        let mut row = work.rows.start;
        while row + LANES < work.rows.end {
            self.inputs_by_panels::<S, W, K, M, 2, C, B>(s, work, row, panel);
            row += 2 * LANES;
        }
        if row < work.rows.end {
            self.inputs_by_panels::<S, W, K, M, 1, C, B>(s, work, row, panel);
        }
    }

    /// `A` tiles of inputs from `row` on times `C` panels of each matrix, which are `B` tiles of weights.
    #[inline(always)]
    fn inputs_by_panels<
        S: Simd,
        W: Paired,
        K: Sink<M>,
        const M: usize,
        const A: usize,
        const C: usize,
        const B: usize,
    >(
        &mut self,
        s: S,
        work: &PairWork<'_, W, K, M>,
        row: usize,
        panel: usize,
    ) {
        const { assert!(A * B <= 4) };
        assert_eq!(B, M * C, "every panel is multiplied");
        let panels = panels_at::<W, M, C>(work.weights, panel);
        let weights: [&[W]; B] = std::array::from_fn(|b| panels[b / C][b % C]);
        self.multiply::<S, W, A, B>(s, work.x, row, weights);
        let count = (work.rows.end - row).min(A * LANES);
        for r in 0..count {
            for c in 0..C {
                let tile = |m: usize| &self.totals.0[r / LANES * B + m * C + c][r % LANES];
                work.sink.put(s, row + r, panel + c, std::array::from_fn(|m| s.load(tile(m))));
            }
        }
    }

    /// `A` tiles of inputs from `row` on times `B` panels: tile `a * B + b` of the totals.
    #[inline(always)]
    fn multiply<S: Simd, W: Paired, const A: usize, const B: usize>(
        &mut self,
        s: S,
        x: PairRows<'_>,
        row: usize,
        weights: [&[W]; B],
    ) {
        let tiles = &mut self.tiles;
        let blocks = weights[0].len();
        // Rows behind the last are spare memory: their totals are never read.
        let inputs = x.rows(row, (A - 1) * LANES + self.rows);
        assert!(blocks * LANES <= x.per_row, "rows are as long as panels");
        for panel in weights {
            assert_eq!(panel.len(), blocks, "panels are of one length");
        }
        let stride = x.per_row * size_of::<u32>();
        // The loads below rely on these ranges: register 4 reads `rows` rows of `inputs` and register 5, where it holds
        // inputs, sixteen rows after the first sixteen, all 64 bytes from a column inside the row; weights are whole
        // blocks of sixteen lines of 64 bytes.
        let input =
            |a: usize, block: usize| inputs.as_ptr().wrapping_add(a * LANES * x.per_row + block * LANES);
        let mut decoded = [Bf16Block::ZERO; B];
        const LINE: usize = LANES * size_of::<u32>();
        tiles.zero::<0>();
        if A * B > 1 {
            tiles.zero::<1>();
        }
        if A * B > 2 {
            tiles.zero::<2>();
            tiles.zero::<3>();
        }
        for block in 0..blocks {
            for (to, panel) in decoded.iter_mut().zip(weights) {
                if W::plain(panel).is_none() {
                    panel[block].decode(s, to);
                }
            }
            let weight = |b: usize| {
                let b = b.min(B - 1);
                let plain = W::plain(weights[b]).map_or(&decoded[b], |panel| &panel[block]);
                plain.as_ptr().cast::<u32>()
            };
            // SAFETY: the ranges stated above lie in `inputs` and in whole blocks of weights.
            unsafe {
                tiles.load::<4>(input(0, block), stride);
                if A == 2 {
                    tiles.load::<6>(weight(0), LINE);
                    tiles.multiply::<0, 4, 6>();
                    tiles.load::<5>(input(1, block), stride);
                    if B == 1 {
                        tiles.multiply::<1, 5, 6>();
                    } else {
                        tiles.multiply::<2, 5, 6>();
                        tiles.load::<7>(weight(1), LINE);
                        tiles.multiply::<1, 4, 7>();
                        tiles.multiply::<3, 5, 7>();
                    }
                } else {
                    tiles.load::<5>(weight(0), LINE);
                    tiles.multiply::<0, 4, 5>();
                    if B > 1 {
                        tiles.load::<6>(weight(1), LINE);
                        tiles.multiply::<1, 4, 6>();
                    }
                    if B > 2 {
                        tiles.load::<7>(weight(2), LINE);
                        tiles.multiply::<2, 4, 7>();
                        tiles.load::<5>(weight(3), LINE);
                        tiles.multiply::<3, 4, 5>();
                    }
                }
            }
        }
        let [first, second, third, fourth] = &mut self.totals.0;
        tiles.store::<0>(first);
        if A * B > 1 {
            tiles.store::<1>(second);
        }
        if A * B > 2 {
            tiles.store::<2>(third);
            tiles.store::<3>(fourth);
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use hardware::Hardware;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use software::Software as Hardware;
#[cfg(test)]
pub(crate) use software::Software;

#[cfg(any(test, not(target_arch = "x86_64")))]
mod software {
    //! Tile registers in plain Rust.

    use super::{LANES, Tiles};
    use crate::simd::Arith;
    use crate::simd::flush::ScalarFlush;

    /// Eight tile registers in memory.
    pub(crate) struct Software {
        rows: [usize; 8],
        tiles: [[[u32; LANES]; LANES]; 8],
    }

    impl Tiles for Software {
        unsafe fn configure(rows: usize) -> Self {
            let rows = [rows, rows, rows, rows, rows, LANES, LANES, LANES];
            // NaN exposes a read before the first write.
            Self { rows, tiles: [[[f32::NAN.to_bits(); LANES]; LANES]; 8] }
        }

        fn zero<const T: usize>(&mut self) {
            self.tiles[T] = [[0; LANES]; LANES];
        }

        unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize) {
            for (r, row) in self.tiles[T].iter_mut().take(self.rows[T]).enumerate() {
                // SAFETY: the caller vouches for 64 bytes of every row.
                *row = unsafe { from.byte_add(r * stride).cast::<[u32; LANES]>().read() };
            }
        }

        fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
            assert_eq!((self.rows[C], self.rows[B]), (self.rows[A], LANES), "shapes fit");
            let low = |pair: u32| f32::from_bits(pair << 16);
            let high = |pair: u32| f32::from_bits(pair & 0xffff_0000);
            for r in 0..self.rows[C] {
                for n in 0..LANES {
                    let (mut even, mut odd) = (0.0, 0.0);
                    for (&a, b) in self.tiles[A][r].iter().zip(&self.tiles[B]) {
                        even = ScalarFlush.fma(low(a), low(b[n]), even);
                        odd = ScalarFlush.fma(high(a), high(b[n]), odd);
                    }
                    let total = f32::from_bits(self.tiles[C][r][n]);
                    self.tiles[C][r][n] = ScalarFlush.add(total, ScalarFlush.add(even, odd)).to_bits();
                }
            }
        }

        fn store<const T: usize>(&mut self, to: &mut [[f32; LANES]; LANES]) {
            for (to, row) in to.iter_mut().zip(&self.tiles[T]).take(self.rows[T]) {
                *to = row.map(f32::from_bits);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod hardware {
    //! The hardware's tile registers, in inline assembly: the intrinsics are not stable.

    use std::arch::asm;

    use super::{LANES, Tiles};

    /// The tile registers of this thread, given back on drop.
    pub(crate) struct Hardware(());

    /// Palette 1 and the shapes of its eight registers, as `ldtilecfg` reads them.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    impl Tiles for Hardware {
        #[inline(always)]
        unsafe fn configure(rows: usize) -> Self {
            assert!((1..=LANES).contains(&rows), "a tile has 1 to 16 rows");
            let mut config =
                Config { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
            config.bytes_per_row[..8].fill(64);
            config.rows[..8].fill(16);
            config.rows[..5].fill(rows as u8);
            // SAFETY: by contract the machine has tiles; the configuration is valid and 64 bytes long.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
            Self(())
        }

        #[inline(always)]
        fn zero<const T: usize>(&mut self) {
            // SAFETY: tiles are configured while `self` lives; the compiler never uses them.
            unsafe { asm!("tilezero tmm{t}", t = const T, options(nomem, nostack, preserves_flags)) };
        }

        #[inline(always)]
        unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize) {
            // SAFETY: as for `zero`; the caller vouches for the memory.
            unsafe {
                asm!(
                    "tileloadd tmm{t}, [{from} + {stride}*1]",
                    t = const T,
                    from = in(reg) from,
                    stride = in(reg) stride,
                    options(readonly, nostack, preserves_flags),
                );
            }
        }

        #[inline(always)]
        fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
            // SAFETY: as for `zero`; the shapes fit by the configuration.
            unsafe {
                asm!(
                    "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                    c = const C,
                    a = const A,
                    b = const B,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }

        #[inline(always)]
        fn store<const T: usize>(&mut self, to: &mut [[f32; LANES]; LANES]) {
            // SAFETY: as for `zero`; a register has at most sixteen rows of 64 bytes.
            unsafe {
                asm!(
                    "tilestored [{to} + {stride}*1], tmm{t}",
                    t = const T,
                    to = in(reg) to.as_mut_ptr(),
                    stride = in(reg) size_of::<[f32; LANES]>(),
                    options(nostack, preserves_flags),
                );
            }
        }
    }

    impl Drop for Hardware {
        #[inline(always)]
        fn drop(&mut self) {
            // SAFETY: as for `zero`. Tiles left in use would be saved at every switch of threads.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    //! Inputs of the tests that run the walk on [`Software`] tiles.

    /// bf16 values of all kinds: mostly plain ones, with zeros, subnormals, tiny, huge and infinite ones among them.
    pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 33) as u32
        };
        (0..len)
            .map(|_| {
                let bits = next() << 16;
                let exponent = match next() % 40 {
                    0 => 0,
                    1 => 1 + next() % 3,
                    2 => 62 + next() % 3,
                    3 if next() % 16 == 0 => 254,
                    4 if next() % 64 == 0 => return f32::INFINITY.copysign(f32::from_bits(bits)),
                    _ => 118 + next() % 12,
                };
                f32::from_bits(bits & 0x807f_0000 | exponent << 23)
            })
            .collect()
    }

    /// Fails with the first place where the bits differ; all NaNs are one.
    pub(crate) fn assert_same(found: &[f32], want: &[f32], what: &str) {
        assert_eq!(found.len(), want.len(), "{what}: lengths");
        for (i, (found, want)) in found.iter().zip(want).enumerate() {
            let same = found.to_bits() == want.to_bits() || (found.is_nan() && want.is_nan());
            assert!(same, "{what}: element {i} is {found:e}, should be {want:e}");
        }
    }
}
