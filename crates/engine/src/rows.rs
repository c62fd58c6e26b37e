//! Matrices of hidden rows as handles: a dtype, a shape and the memory they lie in.

use std::fmt;
use std::marker::PhantomData;

use muster_types::DType;

/// Hidden rows `[count, hidden]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    dtype: DType,
    count: usize,
    hidden: usize,
    at: At<'a>,
}

/// Memory that rows are read from.
#[derive(Debug, Clone, Copy)]
pub enum At<'a> {
    /// Host memory, in the machine's byte order.
    Host(&'a [u8]),
    /// Device memory.
    Device(DeviceSlice<'a>),
}

/// A borrowed range of device memory, as plain numbers: only the device's runtime can follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlice<'a> {
    device: u32,
    pointer: u64,
    bytes: usize,
    ready: u64,
    buffer: PhantomData<&'a ()>,
}

/// Values that do not fill whole rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of {dtype} are no rows of {hidden}")]
pub struct UnevenRows {
    /// Bytes given.
    pub bytes: usize,
    /// Element type.
    pub dtype: DType,
    /// Elements per row.
    pub hidden: usize,
}

impl<'a> Rows<'a> {
    /// Rows in host memory, single precision.
    ///
    /// # Errors
    /// [`UnevenRows`].
    pub fn of_f32(values: &'a [f32], hidden: usize) -> Result<Self, UnevenRows> {
        Self::new(DType::F32, hidden, At::Host(bytemuck::cast_slice(values)))
    }

    /// Rows in host memory, bf16 bit patterns.
    ///
    /// # Errors
    /// [`UnevenRows`].
    pub fn of_bf16(bits: &'a [u16], hidden: usize) -> Result<Self, UnevenRows> {
        Self::new(DType::Bf16, hidden, At::Host(bytemuck::cast_slice(bits)))
    }

    /// Rows in device memory.
    ///
    /// # Errors
    /// [`UnevenRows`].
    pub fn of_device(slice: DeviceSlice<'a>, dtype: DType, hidden: usize) -> Result<Self, UnevenRows> {
        Self::new(dtype, hidden, At::Device(slice))
    }

    fn new(dtype: DType, hidden: usize, at: At<'a>) -> Result<Self, UnevenRows> {
        let bytes = match at {
            At::Host(bytes) => bytes.len(),
            At::Device(slice) => slice.bytes,
        };
        let row = hidden.checked_mul(dtype.size()).filter(|&row| row > 0 && bytes.is_multiple_of(row));
        let row = row.ok_or(UnevenRows { bytes, dtype, hidden })?;
        Ok(Self { dtype, count: bytes / row, hidden, at })
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Elements per row.
    #[must_use]
    pub const fn hidden(&self) -> usize {
        self.hidden
    }

    /// Whether there are no rows.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Memory that the rows lie in.
    #[must_use]
    pub const fn at(&self) -> At<'a> {
        self.at
    }

    /// Kind of that memory, to be named in errors.
    #[must_use]
    pub const fn place(&self) -> Place {
        match self.at {
            At::Host(_) => Place::Host,
            At::Device(slice) => Place::Device(slice.device),
        }
    }

    /// Bytes of rows in host memory.
    #[must_use]
    pub const fn host(&self) -> Option<&'a [u8]> {
        match self.at {
            At::Host(bytes) => Some(bytes),
            At::Device(_) => None,
        }
    }

    /// Values of rows in host memory, if they are f32.
    #[must_use]
    pub fn f32(&self) -> Option<&'a [f32]> {
        // Made of a slice of f32: aligned.
        self.host_of(DType::F32).and_then(|bytes| bytemuck::try_cast_slice(bytes).ok())
    }

    /// Bit patterns of rows in host memory, if they are bf16.
    #[must_use]
    pub fn bf16(&self) -> Option<&'a [u16]> {
        // Made of a slice of u16: aligned.
        self.host_of(DType::Bf16).and_then(|bytes| bytemuck::try_cast_slice(bytes).ok())
    }

    fn host_of(&self, dtype: DType) -> Option<&'a [u8]> {
        self.host().filter(|_| self.dtype == dtype)
    }
}

/// Room for combined rows `[rows, hidden]`: always f32, overwritten, not added to.
#[derive(Debug)]
pub struct RowsMut<'a> {
    at: AtMut<'a>,
}

/// Memory that rows are written to.
#[derive(Debug)]
pub enum AtMut<'a> {
    /// Host memory.
    Host(&'a mut [f32]),
    /// Device memory.
    Device(DeviceSlice<'a>),
}

impl<'a> RowsMut<'a> {
    /// Room in host memory.
    #[must_use]
    pub const fn of_f32(values: &'a mut [f32]) -> Self {
        Self { at: AtMut::Host(values) }
    }

    /// Room in device memory, which nobody else reads or writes meanwhile.
    #[must_use]
    pub const fn of_device(slice: DeviceSlice<'a>) -> Self {
        Self { at: AtMut::Device(slice) }
    }

    /// Memory that the rows go to.
    #[must_use]
    pub fn into_memory(self) -> AtMut<'a> {
        self.at
    }

    /// Kind of that memory, to be named in errors.
    #[must_use]
    pub const fn place(&self) -> Place {
        match &self.at {
            AtMut::Host(_) => Place::Host,
            AtMut::Device(slice) => Place::Device(slice.device),
        }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match &self.at {
            AtMut::Host(values) => values.len(),
            AtMut::Device(slice) => slice.bytes / size_of::<f32>(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Room in host memory, borrowed.
    #[must_use]
    pub const fn f32_mut(&mut self) -> Option<&mut [f32]> {
        match &mut self.at {
            AtMut::Host(values) => Some(values),
            AtMut::Device(_) => None,
        }
    }

    /// Room in host memory.
    #[must_use]
    pub fn into_f32(self) -> Option<&'a mut [f32]> {
        match self.at {
            AtMut::Host(values) => Some(values),
            AtMut::Device(_) => None,
        }
    }
}

impl<'a> DeviceSlice<'a> {
    /// `bytes` bytes at `pointer` on the device with that ordinal, inside a buffer of `owner`. They may be used once the
    /// device has passed the mark `ready`.
    #[must_use]
    pub const fn new<T: ?Sized>(_owner: &'a T, device: u32, pointer: u64, bytes: usize, ready: u64) -> Self {
        Self { device, pointer, bytes, ready, buffer: PhantomData }
    }

    /// Ordinal of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }

    /// Address on the device.
    #[must_use]
    pub const fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Length, bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Mark of the device's work after which the memory may be used.
    #[must_use]
    pub const fn ready(&self) -> u64 {
        self.ready
    }
}

/// Kind of memory that rows lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Host memory.
    Host,
    /// Memory of the device with this ordinal.
    Device(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Device(ordinal) => write!(f, "device {ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_rows_are_read_in_their_own_dtype_alone() {
        let (values, bits) = ([1.0, -0.0, f32::MIN_POSITIVE / 2.0, 4.0], [0x3f80, 0x8000]);
        let (single, half) = (Rows::of_f32(&values, 2).unwrap(), Rows::of_bf16(&bits, 1).unwrap());
        assert_eq!((single.dtype(), single.count(), single.hidden()), (DType::F32, 2, 2));
        assert_eq!((half.dtype(), half.count(), half.hidden()), (DType::Bf16, 2, 1));
        assert!(single.f32().unwrap().iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!((half.bf16(), half.host().map(<[u8]>::len)), (Some(&bits[..]), Some(4)));
        assert_eq!((single.bf16(), half.f32()), (None, None));
        assert!(Rows::of_f32(&[], 3).unwrap().is_empty() && !single.is_empty());
    }

    #[test]
    fn rows_are_whole() {
        for (values, hidden) in [(5, 2), (1, 2), (1, 0), (0, 0), (4, usize::MAX)] {
            let refused = Rows::of_f32(&[0.0; 5][..values], hidden).unwrap_err();
            assert_eq!(refused, UnevenRows { bytes: 4 * values, dtype: DType::F32, hidden });
        }
    }

    #[test]
    fn device_rows_have_no_host_bytes() {
        let buffer = ();
        let slice = DeviceSlice::new(&buffer, 3, 0x7f00_0000_0000, 24, 9);
        let rows = Rows::of_device(slice, DType::Bf16, 4).unwrap();
        assert_eq!((rows.count(), rows.place()), (3, Place::Device(3)));
        assert_eq!((rows.host(), rows.bf16(), rows.f32()), (None, None, None));
        assert!(matches!(rows.at(), At::Device(at) if at == slice));
        assert!(Rows::of_device(slice, DType::F32, 4).is_err());
        let room = RowsMut::of_device(slice);
        assert_eq!(room.place().to_string(), "device 3");
        assert!(room.into_f32().is_none());
    }
}
