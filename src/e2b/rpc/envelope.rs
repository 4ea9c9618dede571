//! Messages in a stream's request: a byte of flags, four bytes of length, the message.

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::Request;
use bytes::{Buf, BufMut, BytesMut};
use futures_util::StreamExt;

use super::{Code, RpcError, STREAM_TYPE, require_type};

/// Flags and length.
const HEAD: usize = 5;
/// A message is never longer than this.
const MAX_MESSAGE: usize = 4 << 20;
const COMPRESSED: u8 = 0x01;
const END: u8 = 0x02;

/// The messages of a request, as they come.
pub struct Envelopes {
    body: BodyDataStream,
    buffer: BytesMut,
}

impl Envelopes {
    /// Nothing is read yet.
    pub fn new(request: Request) -> Result<Self, RpcError> {
        require_type(request.headers(), STREAM_TYPE)?;
        let body: Body = request.into_body();
        Ok(Self { body: body.into_data_stream(), buffer: BytesMut::new() })
    }

    /// The next message; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RpcError> {
        loop {
            if let Some(message) = take(&mut self.buffer)? {
                return Ok(Some(message));
            }
            match self.body.next().await {
                Some(Ok(data)) => self.buffer.extend_from_slice(&data),
                Some(Err(e)) => {
                    let text = format!("the request broke off: {e}");
                    return Err(RpcError::new(Code::InvalidArgument, text));
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => {
                    let text = "the request ended in the middle of a message";
                    return Err(RpcError::new(Code::InvalidArgument, text));
                }
            }
        }
    }
}

/// Takes a whole message out of the buffer, if there is one.
fn take(buffer: &mut BytesMut) -> Result<Option<Bytes>, RpcError> {
    let Some((head, _)) = buffer.split_at_checked(HEAD) else { return Ok(None) };
    if head[0] & COMPRESSED != 0 {
        let text = "compressed messages are not spoken here; send them as they are";
        return Err(RpcError::new(Code::Unimplemented, text));
    }
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX_MESSAGE {
        let text = format!("a message of {length} bytes, at most {MAX_MESSAGE} are taken");
        return Err(RpcError::new(Code::ResourceExhausted, text));
    }
    if buffer.len() < HEAD + length {
        return Ok(None);
    }
    buffer.advance(HEAD);
    Ok(Some(buffer.split_to(length).freeze()))
}

/// A message of a reply.
pub fn message(text: &[u8]) -> Bytes {
    pack(0, text)
}

/// The last envelope of a reply: `{}`, or `{"error": ...}`.
pub fn end(error: Option<&RpcError>) -> Bytes {
    let end = match error {
        Some(error) => serde_json::json!({ "error": error }),
        None => serde_json::json!({}),
    };
    pack(END, end.to_string().as_bytes())
}

fn pack(flags: u8, text: &[u8]) -> Bytes {
    let mut packed = BytesMut::with_capacity(HEAD + text.len());
    packed.put_u8(flags);
    packed.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
    packed.put_slice(text);
    packed.freeze()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    async fn read(parts: Vec<Vec<u8>>) -> Vec<Result<Option<Bytes>, Code>> {
        let parts = parts.into_iter().map(Ok::<_, std::convert::Infallible>);
        let body = Body::from_stream(futures_util::stream::iter(parts));
        let request = Request::builder().header("content-type", STREAM_TYPE).body(body).unwrap();
        let mut envelopes = Envelopes::new(request).unwrap();
        let mut seen = Vec::new();
        loop {
            let next = envelopes.next().await.map_err(|e| e.code());
            let last = !matches!(next, Ok(Some(_)));
            seen.push(next);
            if last {
                return seen;
            }
        }
    }

    #[tokio::test]
    async fn messages_come_out_however_they_were_cut() {
        let mut bytes = message(br#"{"a":1}"#).to_vec();
        bytes.extend_from_slice(&message(b""));
        bytes.extend_from_slice(&message(b"{}"));
        let whole = [br#"{"a":1}"#.as_slice(), b"", b"{}"].map(|m| Ok(Some(Bytes::from(m))));
        for size in [1, 3, 5, 6, 100] {
            let parts = bytes.chunks(size).map(<[u8]>::to_vec).collect();
            let seen = read(parts).await;
            assert_eq!(seen[..3], whole, "in pieces of {size}");
            assert_eq!(seen[3], Ok(None));
        }
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused() {
        assert_eq!(read(vec![vec![0, 0, 0, 0, 9, b'{']]).await, [Err(Code::InvalidArgument)]);
        assert_eq!(read(vec![vec![1, 0, 0, 0, 0]]).await, [Err(Code::Unimplemented)]);
        assert_eq!(read(vec![vec![0, 0xff, 0, 0, 0]]).await, [Err(Code::ResourceExhausted)]);
        let plain = Request::builder().header("content-type", "application/json");
        assert!(Envelopes::new(plain.body(Body::empty()).unwrap()).is_err());
    }

    #[test]
    fn the_end_says_how_it_ended() {
        assert_eq!(end(None), &b"\x02\0\0\0\x02{}"[..]);
        let error = RpcError::new(Code::NotFound, "no process 7");
        let text = br#"{"error":{"code":"not_found","message":"no process 7"}}"#;
        assert_eq!(end(Some(&error))[HEAD..], text[..]);
    }
}
