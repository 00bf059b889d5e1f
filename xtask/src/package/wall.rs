//! The wall of the installed host, in a browser outside of the fresh root, which shares its network.
//!
//! ```text
//! lifecycle.sh ──address──▶ browser: the tile `m` is off
//!   restore    ◀──"off"───  browser: the tile changes, with a screen ─▶ picture
//!   stop       ◀─"running"─ browser: the tile changes
//!              ◀──"off"───
//! ```
//!
//! The script and this module pass lines through two named pipes beside the script, and wait for each other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use machinery_testkit::browser::{self, Browser};

use super::files::{read, write};
use crate::run::{Failure, Result, output};

/// The tile of the machine in the page.
const TILE: &str = "document.querySelector('a.tile[href=\"#machine=m\"]')";

/// Shows the wall in a browser as soon as the script in `folder` asks for it, and writes `picture`. A failure is the
/// script's reply, and so its own failure.
pub fn show_when_asked(folder: &Path, picture: PathBuf) -> Result<()> {
    let (asked, seen) = (folder.join("asked"), folder.join("seen"));
    output(Command::new("mkfifo").args([&asked, &seen]))?;
    // A script that ends before it asks leaves the thread to the end of this process.
    thread::spawn(move || {
        let shown =
            read(&asked).and_then(|address| show(address.trim(), &picture, |state| write(&seen, state)));
        if let Err(failure) = shown {
            let _ = write(&seen, &failure.to_string());
        }
    });
    Ok(())
}

/// Opens the wall, and reports each state that its tile shows.
fn show(address: &str, picture: &Path, report: impl Fn(&str) -> Result<()>) -> Result<()> {
    let program = browser::program().ok_or_else(|| Failure::from("there is no browser".to_owned()))?;
    let mut browser = Browser::start(&program, 1280, 720)?;
    browser.open(address)?;
    browser.wait_until(&format!("/poweroff/.test({TILE}.innerText)"))?;
    // A page that loads again loses this value.
    browser.evaluate("window.isSame = true")?;
    report("off")?;
    browser.wait_until(&format!("/running/.test({TILE}.innerText)"))?;
    browser.wait_until(&format!("{TILE}.querySelector('img').naturalWidth > 0"))?;
    save(&mut browser, picture)?;
    report("running")?;
    browser.wait_until(&format!("window.isSame && /poweroff/.test({TILE}.innerText)"))?;
    report("off")
}

fn save(browser: &mut Browser, picture: &Path) -> Result<()> {
    let encoded = picture.with_extension("base64");
    write(&encoded, &browser.picture()?)?;
    let decode = "base64 --decode \"$1\" > \"$2\" && rm \"$1\"";
    output(Command::new("sh").args(["-c", decode, "sh"]).args([encoded.as_path(), picture]))?;
    eprintln!("The wall with a running machine: {}", picture.display());
    Ok(())
}
