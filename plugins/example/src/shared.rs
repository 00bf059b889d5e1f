//! Everything that the machines share.

use machinery::Host;

/// Everything that the machines share. A real backend has its connection here.
pub struct Example {
    pub host: Host,
}
