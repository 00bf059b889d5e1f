//! The token of the wall: a secret in a file that only the host's user can read.
//!
//! A browser gets a cookie in exchange for it. The cookie is derived from the token, so that the token itself leaves the
//! computer only once, and a new token ends all cookies.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use sha2::{Digest, Sha256};

use crate::config::Wall;
use crate::cwd::Cwd;

/// The number of random bytes of a token.
const LENGTH: usize = 32;
/// The number of characters that a token has, at least: those of an operator's own.
const MIN_LENGTH: usize = 32;
/// The number of characters that a token has, at most.
const MAX_LENGTH: usize = 256;

/// Returns the path of the token.
pub fn token_file(wall: &Wall, cwd: &Cwd) -> PathBuf {
    wall.token_file.clone().unwrap_or_else(|| cwd.wall_token())
}

/// The secret of those who may look.
pub struct Token {
    text: String,
    cookie: String,
}

impl Token {
    /// Reads the token, and makes a missing file with a new one. This blocks.
    ///
    /// # Errors
    /// The file cannot be read or made, other users could read it, or its content is no token.
    pub fn open(file: &Path) -> Result<Token> {
        if file.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            make(file).map_err(|error| Error::io("make the wall's token", file, &error))?;
            tracing::info!(file = %file.display(), "a new token of the wall is made");
        }
        Token::read(file)
    }

    /// Reads the token. This blocks.
    ///
    /// # Errors
    /// The file cannot be read, other users could read it, or its content is no token.
    pub fn read(file: &Path) -> Result<Token> {
        let failed = |error: io::Error| Error::io("read the wall's token", file, &error);
        expect_trusted(file)?;
        let mode = fs::metadata(file).map_err(failed)?.mode();
        if mode & 0o077 != 0 {
            let reason = format!("other users could read the wall's token {}", file.display());
            return Err(Error::environment(reason)
                .advice("Set its mode to 0600, or remove it: the host makes a new one"));
        }
        Token::new(fs::read_to_string(file).map_err(failed)?.trim()).ok_or_else(|| {
            Error::environment(format!("{} has no token of the wall", file.display()))
                .advice("Write 32 to 256 letters and digits, or remove it: the host makes a new one")
        })
    }

    fn new(text: &str) -> Option<Token> {
        let is_token = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        if !is_token || !(MIN_LENGTH..=MAX_LENGTH).contains(&text.len()) {
            return None;
        }
        let value = hex(&digest("cookie of the wall", text));
        // Browsers send a cookie to each port of this computer, so a second wall needs another name.
        let name = &hex(&digest("name of the cookie of the wall", text))[..8];
        Some(Token { text: text.to_owned(), cookie: format!("cuckoo_wall_{name}={value}") })
    }

    /// Reports whether this is the token. The time does not depend on the number of equal characters.
    pub fn is(&self, text: &str) -> bool {
        is_same(&self.text, text)
    }

    /// Returns the cookie, as a browser sends it.
    pub fn cookie(&self) -> &str {
        &self.cookie
    }

    /// Reports whether this is the cookie, in the same way.
    pub fn is_cookie(&self, cookie: &str) -> bool {
        is_same(&self.cookie, cookie)
    }
}

/// Returns the address to log in. A browser does not send the part after `#` to any server, so no log has it.
///
/// # Errors
/// The token cannot be read.
pub fn login_url(address: &str, token_file: &Path) -> Result<String> {
    Ok(format!("{address}/#{}", Token::read(token_file)?.text))
}

/// Compares the digests of both, all bytes of them.
fn is_same(one: &str, other: &str) -> bool {
    let (one, other) = (digest("", one), digest("", other));
    one.iter().zip(other).fold(0, |differing, (one, other)| differing | (one ^ other)) == 0
}

fn digest(purpose: &str, text: &str) -> [u8; 32] {
    Sha256::new().chain_update(purpose).chain_update([0]).chain_update(text).finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn make(file: &Path) -> io::Result<()> {
    let mut random = [0; LENGTH];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    // Never a file that somebody else has made meanwhile.
    let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    writeln!(new, "{}", hex(&random))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn token_is_made_once_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let first = Token::open(&file).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(Token::open(&file).unwrap().text, first.text);
        assert_eq!(first.text.len(), 2 * LENGTH);
        let url = login_url("http://127.0.0.1:1", &file).unwrap();
        assert_eq!(url, format!("http://127.0.0.1:1/#{}", first.text));
        let other = Token::open(&folder.path().join("other")).unwrap();
        assert!(other.text != first.text && other.cookie != first.cookie);
    }

    #[test]
    fn token_is_refused_when_others_can_read_it_or_it_is_too_short() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        Token::open(&file).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(Token::open(&file).err().unwrap().to_string().contains("other users could read"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        for bad in ["", "short", &"ä".repeat(32), &"a".repeat(257), &"a b".repeat(16)] {
            fs::write(&file, bad).unwrap();
            assert!(Token::open(&file).err().unwrap().to_string().contains("has no token"), "{bad}");
        }
    }

    #[test]
    fn token_and_its_cookie_are_accepted_and_nothing_else() {
        let token = Token::new(&"a".repeat(32)).unwrap();
        assert!(token.is(&"a".repeat(32)) && token.is_cookie(token.cookie()));
        for wrong in ["", "a", &"a".repeat(31), &"a".repeat(33), &"b".repeat(32), token.cookie()] {
            assert!(!token.is(wrong), "{wrong}");
        }
        assert!(!token.is_cookie("") && !token.is_cookie(&token.text));
        assert!(!token.cookie().contains(&token.text));
    }
}
