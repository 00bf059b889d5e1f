//! The operating system of a domain, by its ID in libosinfo.
//!
//! virt-manager and virt-install write the ID into the domain, such as `http://microsoft.com/win/10`. Source: the IDs of
//! osinfo-db.

/// Linux distributions, by their short names in the IDs.
const LINUX: [&str; 18] = [
    "almalinux",
    "alpinelinux",
    "altlinux",
    "archlinux",
    "centos",
    "centos-stream",
    "debian",
    "fedora",
    "gentoo",
    "linux",
    "mageia",
    "manjaro",
    "nixos",
    "ol",
    "opensuse",
    "rhel",
    "rocky",
    "ubuntu",
];

/// Returns the platform and its version, as far as the ID has them.
pub fn of_id(id: &str) -> (Option<String>, Option<String>) {
    let Some((_, path)) = id.split_once("://") else { return (None, None) };
    let mut parts = path.split('/').skip(1);
    let (product, version) = (parts.next().unwrap_or_default(), parts.next().filter(|part| !part.is_empty()));
    let platform = match product {
        "win" => "windows",
        "macosx" => "darwin",
        "android-x86" => "android",
        linux if LINUX.contains(&linux) => "linux",
        _ => return (None, None),
    };
    let version = version.map(str::to_lowercase).map(|version| match product {
        "win" => windows_version(version),
        _ => version,
    });
    // That of an unknown Linux is the year of its kernel.
    (Some(platform.to_owned()), version.filter(|version| product != "linux" && version != "unknown"))
}

/// Returns the version of Windows in Cuckoo's words: libosinfo writes `2k16` for 2016.
fn windows_version(version: String) -> String {
    match version.strip_prefix("2k") {
        None => version,
        Some("") => "2000".to_owned(),
        Some(year) if year.starts_with(['3', '8']) => format!("200{year}"),
        Some(year) => format!("20{year}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_is_known_by_its_id() {
        for (id, platform, version) in [
            ("http://microsoft.com/win/10", "windows", "10"),
            ("http://microsoft.com/win/8.1", "windows", "8.1"),
            ("http://microsoft.com/win/XP", "windows", "xp"),
            ("http://microsoft.com/win/2k", "windows", "2000"),
            ("http://microsoft.com/win/2k8r2", "windows", "2008r2"),
            ("http://microsoft.com/win/2k16", "windows", "2016"),
            ("http://ubuntu.com/ubuntu/22.04", "linux", "22.04"),
            ("http://debian.org/debian/12", "linux", "12"),
            ("http://apple.com/macosx/10.7", "darwin", "10.7"),
        ] {
            assert_eq!(of_id(id), (Some(platform.to_owned()), Some(version.to_owned())), "{id}");
        }
    }

    #[test]
    fn system_is_unknown_when_its_id_does_not_have_it() {
        assert_eq!(of_id("http://libosinfo.org/linux/2022"), (Some("linux".to_owned()), None));
        assert_eq!(of_id("http://microsoft.com/win/"), (Some("windows".to_owned()), None));
        for id in ["", "win/10", "http://freebsd.org/freebsd/13.2", "http://libosinfo.org/unknown/1"] {
            assert_eq!(of_id(id), (None, None), "{id}");
        }
    }
}
