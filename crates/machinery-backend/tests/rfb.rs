//! The screen of a real VNC server: QEMU's, without a guest.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use machinery::Deadline;
use machinery_backend::process::{LineKind, Process};
use machinery_backend::rfb;

#[test]
fn screenshot_is_read_from_the_vnc_server_of_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vnc");
    let mut command = machinery::command(Path::new("qemu-system-x86_64"));
    command.args(["-M", "pc,accel=tcg", "-nodefaults", "-display", "none", "-device", "VGA", "-S", "-vnc"]);
    command.arg(format!("unix:{}", socket.display()));
    let process = Process::start(command, "m", |_| LineKind::Other).unwrap();
    let deadline = Deadline::after(Duration::from_secs(60));
    let connect = || Ok(UnixStream::connect(&socket).ok());
    let stream = process.handle().wait_until(deadline, "QEMU's VNC server", connect).unwrap();
    stream.set_read_timeout(Some(deadline.left())).unwrap();
    let mut png = Vec::new();
    rfb::screenshot(&stream, &mut png, deadline).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let (width, height) = (reader.info().width, reader.info().height);
    assert!(width >= 640 && height >= 400, "{width}×{height}");
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    assert!(pixels.iter().any(|byte| *byte != 0), "QEMU writes that the display is not initialized");
    process.end(Duration::ZERO);
}
