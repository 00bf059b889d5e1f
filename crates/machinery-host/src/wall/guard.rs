//! The rules for each request, in this order.
//!
//! | rule | against |
//! | --- | --- |
//! | `Host` is an IP address, `localhost` or a name in `web_origins` | a foreign name that resolves to this computer |
//! | the page of another origin asks for nothing | pages that use the cookie of whoever looks |
//! | a cookie, or the token itself; on a Unix socket, the proxy decides | strangers |
//! | a change has an origin, unless a program sends the token | pages that hide their origin |
//!
//! The files of the page have no secrets, so anybody may read them.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode};

use super::token::Token;
use crate::config::authority;

/// The rules of one wall.
pub struct Guard {
    /// The token, unless a proxy decides who may look.
    token: Option<Token>,
    origins: Vec<String>,
}

/// The reason for refusing a request.
pub type Refusal = (StatusCode, &'static str);

/// The proof that a request is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// A cookie, or a connection through the proxy: a browser adds it to the requests of foreign pages too.
    OfBrowser,
    /// The token: only a program sends it.
    OfProgram,
}

const WRONG_HOST: Refusal = (
    StatusCode::MISDIRECTED_REQUEST,
    "the wall is not served under this name: use its IP address, or add the origin to `web_origins`\n",
);
const WRONG_ORIGIN: Refusal =
    (StatusCode::FORBIDDEN, "this page is not the wall's own: a proxy's origin belongs into `web_origins`\n");
const NO_ORIGIN: Refusal = (StatusCode::FORBIDDEN, "a change needs the header Origin, or the token\n");
const NO_TOKEN: Refusal = (StatusCode::UNAUTHORIZED, "log in: `cuckoo-machinery wall` prints the address\n");

impl Guard {
    /// Returns the rules for these.
    pub fn new(token: Option<Token>, origins: Vec<String>) -> Self {
        Guard { token, origins }
    }

    /// Expects a name that belongs to the wall.
    ///
    /// # Errors
    /// The name is another one, or missing.
    pub fn expect_host(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let host = text(headers, HOST).unwrap_or_default().to_lowercase();
        let is_origin = self.origins.iter().any(|origin| authority(origin) == Some(&host));
        if is_origin || is_address(&host) { Ok(()) } else { Err(WRONG_HOST) }
    }

    /// Expects that the request may see or change machines.
    ///
    /// # Errors
    /// The request comes from a foreign page, or without a proof.
    pub fn expect_allowed(&self, method: &Method, headers: &HeaderMap) -> Result<(), Refusal> {
        let origin = self.origin(headers)?;
        let proof = self.proof(headers).ok_or(NO_TOKEN)?;
        let changes = !matches!(*method, Method::GET | Method::HEAD);
        match changes && proof == Proof::OfBrowser && origin.is_none() {
            true => Err(NO_ORIGIN),
            false => Ok(()),
        }
    }

    /// Returns the cookie for a request that has the token itself. It is a secure one if the page was loaded so.
    ///
    /// # Errors
    /// The token is wrong, or the request comes from a foreign page.
    pub fn cookie(&self, headers: &HeaderMap) -> Result<String, Refusal> {
        let origin = self.origin(headers)?;
        let token = self.token.as_ref().filter(|token| has_token(token, headers)).ok_or(NO_TOKEN)?;
        let secure = if origin.is_some_and(|origin| origin.starts_with("https:")) { "; Secure" } else { "" };
        // A month.
        Ok(format!("{}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000{secure}", token.cookie()))
    }

    /// Returns the origin of the page that has sent the request, if the browser names it.
    fn origin<'h>(&self, headers: &'h HeaderMap) -> Result<Option<&'h str>, Refusal> {
        // A browser leaves this header out only where the connection is neither encrypted nor local.
        let site = text(headers, "sec-fetch-site");
        if site.is_some_and(|site| !matches!(site, "same-origin" | "none")) {
            return Err(WRONG_ORIGIN);
        }
        let Some(origin) = headers.get(ORIGIN) else { return Ok(None) };
        let host = text(headers, HOST).unwrap_or_default();
        let origin = origin.to_str().map_err(|_| WRONG_ORIGIN)?;
        // A name has the origins of `web_origins` alone: others could send pages without encryption under it.
        let plain = origin.strip_prefix("http://").filter(|name| is_address(&name.to_lowercase()));
        let is_own = plain.is_some_and(|name| name.eq_ignore_ascii_case(host))
            || self.origins.iter().any(|own| own.eq_ignore_ascii_case(origin));
        if is_own { Ok(Some(origin)) } else { Err(WRONG_ORIGIN) }
    }

    fn proof(&self, headers: &HeaderMap) -> Option<Proof> {
        let Some(token) = &self.token else { return Some(Proof::OfBrowser) };
        if has_token(token, headers) {
            return Some(Proof::OfProgram);
        }
        let cookies = headers.get_all(COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let mut cookies = cookies.flat_map(|cookies| cookies.split(';'));
        cookies.any(|cookie| token.is_cookie(cookie.trim())).then_some(Proof::OfBrowser)
    }
}

fn has_token(token: &Token, headers: &HeaderMap) -> bool {
    let bearer = text(headers, AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    bearer.is_some_and(|bearer| token.is(bearer.trim()))
}

/// Returns the value of a header that is there once.
fn text(headers: &HeaderMap, name: impl axum::http::header::AsHeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().filter(|_| values.next().is_none())?;
    value.to_str().ok()
}

/// Reports whether a host with an optional port is an IP address or this computer's own name.
fn is_address(host: &str) -> bool {
    let is_port = |port: &str| port.parse::<u16>().is_ok();
    if let Some((address, rest)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        let port = rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port);
        return port && address.parse::<Ipv6Addr>().is_ok();
    }
    let (name, port) = host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port)));
    port.is_none_or(is_port) && (name == "localhost" || name.parse::<IpAddr>().is_ok())
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    fn guard(socket: bool) -> (Guard, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let token = Token::open(&folder.path().join("token")).unwrap();
        (Guard::new(Some(token).filter(|_| !socket), vec!["https://wall.lab".into()]), folder)
    }

    #[test]
    fn host_is_an_address_or_a_name_in_web_origins() {
        let (guard, _folder) = guard(false);
        let expect = |host: &str| guard.expect_host(&headers(&[("host", host)]));
        for good in ["127.0.0.1:8899", "localhost", "LOCALHOST:1", "[::1]:8899", "10.0.0.1", "wall.lab"] {
            assert_eq!(expect(good), Ok(()), "{good}");
        }
        for bad in
            ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil", "127.0.0.1:x", "wall.lab:1"]
        {
            assert_eq!(expect(bad), Err(WRONG_HOST), "{bad}");
        }
        assert_eq!(guard.expect_host(&HeaderMap::new()), Err(WRONG_HOST));
        let mut twice = headers(&[("host", "127.0.0.1")]);
        twice.append("host", HeaderValue::from_static("127.0.0.1"));
        assert_eq!(guard.expect_host(&twice), Err(WRONG_HOST));
    }

    #[test]
    fn change_needs_a_proof_and_an_origin() {
        let (guard, _folder) = guard(false);
        let token = guard.token.as_ref().unwrap();
        let cookie = format!("other=1; {}", token.cookie());
        let bearer =
            format!("Bearer {}", std::fs::read_to_string(_folder.path().join("token")).unwrap().trim());
        let own = ("origin", "http://127.0.0.1:1");
        let with = |more: &[(&'static str, &str)], method: Method| {
            let all: Vec<_> = more.iter().copied().chain([("host", "127.0.0.1:1")]).collect();
            guard.expect_allowed(&method, &headers(&all))
        };
        let cookie = ("cookie", cookie.as_str());
        let bearer = ("authorization", bearer.as_str());
        for (more, get, post) in [
            (vec![], Err(NO_TOKEN), Err(NO_TOKEN)),
            (vec![own], Err(NO_TOKEN), Err(NO_TOKEN)),
            (vec![("cookie", "cuckoo_wall_x=1"), own], Err(NO_TOKEN), Err(NO_TOKEN)),
            (vec![("authorization", "Bearer x")], Err(NO_TOKEN), Err(NO_TOKEN)),
            (vec![cookie], Ok(()), Err(NO_ORIGIN)),
            (vec![cookie, own], Ok(()), Ok(())),
            (vec![cookie, own, ("sec-fetch-site", "same-origin")], Ok(()), Ok(())),
            (vec![cookie, ("origin", "https://WALL.lab")], Ok(()), Ok(())),
            (vec![cookie, own, ("sec-fetch-site", "same-site")], Err(WRONG_ORIGIN), Err(WRONG_ORIGIN)),
            (vec![cookie, ("sec-fetch-site", "cross-site")], Err(WRONG_ORIGIN), Err(WRONG_ORIGIN)),
            (vec![cookie, ("origin", "http://127.0.0.1:2")], Err(WRONG_ORIGIN), Err(WRONG_ORIGIN)),
            (vec![cookie, ("origin", "http://wall.lab")], Err(WRONG_ORIGIN), Err(WRONG_ORIGIN)),
            (vec![cookie, ("origin", "null")], Err(WRONG_ORIGIN), Err(WRONG_ORIGIN)),
            (vec![bearer], Ok(()), Ok(())),
            (vec![bearer, ("origin", "http://evil")], Err(WRONG_ORIGIN), Err(WRONG_ORIGIN)),
        ] {
            assert_eq!((with(&more, Method::GET), with(&more, Method::POST)), (get, post), "{more:?}");
        }
    }

    #[test]
    fn socket_needs_no_token_and_still_an_origin() {
        let (guard, _folder) = guard(true);
        let from = |origin: &str| {
            guard.expect_allowed(&Method::POST, &headers(&[("host", "wall.lab"), ("origin", origin)]))
        };
        assert_eq!(from("https://wall.lab"), Ok(()));
        assert_eq!(from("https://evil"), Err(WRONG_ORIGIN));
        let without = headers(&[("host", "wall.lab")]);
        assert_eq!(guard.expect_allowed(&Method::POST, &without), Err(NO_ORIGIN));
        assert_eq!(guard.expect_allowed(&Method::GET, &without), Ok(()));
        assert_eq!(guard.cookie(&without), Err(NO_TOKEN));
    }

    #[test]
    fn name_has_no_origin_without_encryption_unless_it_is_listed() {
        let (guard, _folder) = guard(true);
        let from = |host: &str, origin: &str| {
            guard.expect_allowed(&Method::POST, &headers(&[("host", host), ("origin", origin)]))
        };
        assert_eq!(from("wall.lab", "http://wall.lab"), Err(WRONG_ORIGIN));
        assert_eq!(from("wall.lab", "https://wall.lab"), Ok(()));
        for host in ["127.0.0.1:1", "LOCALHOST:1", "[::1]:1"] {
            assert_eq!(from(host, &format!("http://{host}")), Ok(()), "{host}");
        }
    }

    #[test]
    fn cookie_is_only_for_the_wall_itself() {
        let (guard, folder) = guard(false);
        let text = std::fs::read_to_string(folder.path().join("token")).unwrap();
        let bearer = format!("Bearer {}", text.trim());
        let cookie = |origin| {
            guard.cookie(&headers(&[("host", "wall.lab"), ("origin", origin), ("authorization", &bearer)]))
        };
        let secure = cookie("https://wall.lab").unwrap();
        assert!(secure.ends_with("; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000; Secure"), "{secure}");
        assert!(cookie("http://wall.lab:80").is_err() && cookie("http://evil").is_err());
        assert!(guard.cookie(&headers(&[("host", "wall.lab")])).is_err());
    }
}
