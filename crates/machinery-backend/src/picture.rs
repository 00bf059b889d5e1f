//! Converts the images of hypervisors to PNG.

use std::io::Write;

use machinery::{Error, Result};

/// Reports whether these are the first bytes of a PPM image.
pub fn is_ppm(start: &[u8]) -> bool {
    start.starts_with(b"P6")
}

/// Writes `ppm` as PNG to `file`. `ppm` must have the form that QEMU writes: `P6`, no comments, 255 levels.
///
/// # Errors
/// `ppm` is not such an image; the file cannot be written.
pub fn ppm_to_png(ppm: &[u8], file: impl Write) -> Result<()> {
    let wrong = || Error::failed("the hypervisor's screenshot is not a PPM image");
    let (width, height, pixels) = read_ppm(ppm).ok_or_else(wrong)?;
    rgb_to_png(width, height, pixels, file)
}

/// Writes pixels as PNG to `file`: red, green and blue of each, row by row from the top.
///
/// # Errors
/// The number of bytes does not match; the file cannot be written.
pub fn rgb_to_png(width: u32, height: u32, rgb: &[u8], file: impl Write) -> Result<()> {
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written =
        encoder.write_header().and_then(|mut png| png.write_image_data(rgb).and_then(|()| png.finish()));
    written.map_err(|error| Error::environment(format!("cannot write the screenshot: {error}")))
}

/// Returns width, height and pixels.
fn read_ppm(ppm: &[u8]) -> Option<(u32, u32, &[u8])> {
    let mut rest = ppm.strip_prefix(b"P6")?;
    let mut number = || {
        rest = rest.trim_ascii_start();
        let length = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (digits, after) = rest.split_at(length);
        rest = after;
        std::str::from_utf8(digits).ok()?.parse::<u32>().ok()
    };
    let (width, height, levels) = (number()?, number()?, number()?);
    let pixels = rest.get(1..)?;
    let length = usize::try_from(width).ok()?.checked_mul(height.try_into().ok()?)?.checked_mul(3)?;
    (levels == 255 && pixels.len() == length).then_some((width, height, pixels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ppm_becomes_a_png_with_the_same_pixels() {
        let ppm = b"P6\n2 1\n255\n\x01\x02\x03\x0a\x0b\x0c";
        assert!(is_ppm(ppm));
        let mut file = Vec::new();
        ppm_to_png(ppm, &mut file).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; 6];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, [1, 2, 3, 10, 11, 12]);
    }

    #[test]
    fn ppm_is_refused_when_it_is_incomplete() {
        for bytes in
            [&b""[..], b"P6", b"P6\n2 1\n255\n\x01", b"P5\n1 1\n255\nx", b"P6\n99999999 99999999\n255\n"]
        {
            assert!(ppm_to_png(bytes, Vec::new()).is_err(), "{bytes:?}");
        }
    }
}
