// A Workload API client that shares no line with Countersign or go-spiffe: grpc-js, Node's own X.509 and JOSE, and the public
// workload.proto (of the SPIFFE project, Apache-2.0; its path is an argument).
//
//   node client.js SOCKET PROTO denied        every call without an identity, or without the security header
//   node client.js SOCKET PROTO identity ID   X.509-SVID, rotation, mutual TLS, JWT-SVID, bundles, validation
'use strict'
const assert = require('node:assert/strict')
const crypto = require('node:crypto')
const tls = require('node:tls')
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')

const [socket, proto, what, id] = process.argv.slice(2)
const api = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true })).SpiffeWorkloadAPI
const client = new api('unix:' + socket, grpc.credentials.createInsecure())
const limit = () => ({ deadline: Date.now() + 30000 })

function header(value = 'true') {
  const m = new grpc.Metadata()
  if (value) m.set('workload.spiffe.io', value)
  return m
}

function unary(method, request, meta = header()) {
  return new Promise((resolve, reject) => client[method](request, meta, limit(), (err, res) => err ? reject(err) : resolve(res)))
}

// stream resolves to the first n messages, or rejects with the stream's error.
function stream(method, n = 1, meta = header()) {
  return new Promise((resolve, reject) => {
    const got = []
    const call = client[method]({}, meta, limit())
    call.on('data', m => {
      got.push(m)
      if (got.length === n) { resolve(got); call.cancel() }
    })
    call.on('error', reject)
    call.on('end', () => reject(new Error('the stream ended in good order')))
  })
}

async function refused(code, promise, name) {
  const err = await promise.then(() => assert.fail(name + ' was answered'), e => e)
  assert.equal(err.code, code, `${name}: ${err.message}`)
  console.log('ok', name, grpc.status[code])
}

// certificates cuts concatenated DER.
function certificates(der) {
  const out = []
  for (let at = 0; at < der.length;) {
    assert.equal(der[at], 0x30)
    const bytes = der[at + 1] & 0x7f
    assert.ok(der[at + 1] & 0x80 && bytes <= 3, 'a certificate is 128 bytes or more')
    const size = 2 + bytes + der.readUIntBE(at + 2, bytes)
    out.push(new crypto.X509Certificate(der.subarray(at, at + size)))
    at += size
  }
  return out
}

const calls = meta => [
  ['FetchX509SVID', () => stream('FetchX509SVID', 1, meta)],
  ['FetchX509Bundles', () => stream('FetchX509Bundles', 1, meta)],
  ['FetchJWTBundles', () => stream('FetchJWTBundles', 1, meta)],
  ['FetchJWTSVID', () => unary('FetchJWTSVID', { audience: ['a'] }, meta)],
  ['ValidateJWTSVID', () => unary('ValidateJWTSVID', { audience: 'a', svid: 'x' }, meta)],
]

async function denied() {
  for (const [name, call] of calls(header(''))) await refused(grpc.status.INVALID_ARGUMENT, call(), name + ' without the header')
  for (const [name, call] of calls(header('false'))) await refused(grpc.status.INVALID_ARGUMENT, call(), name + ' with header false')
  await refused(grpc.status.PERMISSION_DENIED, stream('FetchX509SVID'), 'FetchX509SVID without an identity')
  await refused(grpc.status.PERMISSION_DENIED, unary('FetchJWTSVID', { audience: ['a'] }), 'FetchJWTSVID without an identity')
}

// checkX509 verifies one answer as a relying party would, and returns what TLS needs.
function checkX509(res) {
  assert.equal(res.svids.length, 1)
  const svid = res.svids[0]
  assert.equal(svid.spiffe_id, id)
  const chain = certificates(svid.x509_svid)
  const roots = certificates(svid.bundle)
  const key = crypto.createPrivateKey({ key: svid.x509_svid_key, format: 'der', type: 'pkcs8' })
  const leaf = chain[0]
  assert.equal(leaf.subjectAltName, 'URI:' + id)
  assert.ok(!leaf.ca && leaf.checkPrivateKey(key))
  assert.ok(Date.parse(leaf.validFrom) <= Date.now() && Date.now() < Date.parse(leaf.validTo))
  for (const [i, c] of chain.entries()) {
    const above = chain[i + 1] ? [chain[i + 1]] : roots
    assert.ok(above.some(a => a.ca && c.checkIssued(a) && c.verify(a.publicKey)), `certificate ${i} is not signed by the next`)
  }
  const pem = list => list.map(c => c.toString()).join('')
  return { serial: leaf.serialNumber, cert: pem(chain), ca: pem(roots), key: key.export({ format: 'pem', type: 'pkcs8' }) }
}

// mutual makes one handshake in which both sides demand the other's SVID.
function mutual(own) {
  const peer = s => {
    assert.ok(s.authorized, String(s.authorizationError))
    assert.equal(s.getPeerCertificate().subjectaltname, 'URI:' + id)
  }
  return new Promise((resolve, reject) => {
    const server = tls.createServer({ ...own, requestCert: true, rejectUnauthorized: true, minVersion: 'TLSv1.2' }, s => {
      try { peer(s) } catch (e) { reject(e) }
      s.end('well')
    })
    server.on('tlsClientError', reject)
    server.listen(0, '127.0.0.1', () => {
      const c = tls.connect({ ...own, port: server.address().port, host: '127.0.0.1', checkServerIdentity: () => undefined }, () => {
        try { peer(c) } catch (e) { reject(e) }
      })
      c.on('error', reject)
      c.on('data', d => { assert.equal(String(d), 'well'); c.end(); server.close(resolve) })
    })
  })
}

async function jwt() {
  const { svids } = await unary('FetchJWTSVID', { audience: ['reports', 'more'] })
  assert.equal(svids.length, 1)
  assert.equal(svids[0].spiffe_id, id)
  const token = svids[0].svid
  const [head, body, signature] = token.split('.')
  const header = JSON.parse(Buffer.from(head, 'base64url'))
  const claims = JSON.parse(Buffer.from(body, 'base64url'))
  assert.equal(header.alg, 'ES256')
  assert.equal(claims.sub, id)
  assert.deepEqual([...claims.aud].sort(), ['more', 'reports'])
  assert.ok(claims.exp > Date.now() / 1000)
  const [{ bundles }] = await stream('FetchJWTBundles')
  const domain = 'spiffe://' + new URL(id).host
  const jwk = JSON.parse(bundles[domain]).keys.find(k => k.kid === header.kid)
  const key = crypto.createPublicKey({ key: jwk, format: 'jwk' })
  assert.ok(crypto.verify('sha256', Buffer.from(head + '.' + body), { key, dsaEncoding: 'ieee-p1363' }, Buffer.from(signature, 'base64url')))
  const valid = await unary('ValidateJWTSVID', { audience: 'reports', svid: token })
  assert.equal(valid.spiffe_id, id)
  assert.equal(valid.claims.fields.sub.stringValue, id)
  console.log('ok JWT-SVID', id)
  await refused(grpc.status.INVALID_ARGUMENT, unary('ValidateJWTSVID', { audience: 'others', svid: token }), 'a JWT-SVID for others')
  const i = head.length + 5
  const changed = token.slice(0, i) + (token[i] === 'A' ? 'B' : 'A') + token.slice(i + 1)
  await refused(grpc.status.INVALID_ARGUMENT, unary('ValidateJWTSVID', { audience: 'reports', svid: changed }), 'a changed JWT-SVID')
  await refused(grpc.status.INVALID_ARGUMENT, unary('FetchJWTSVID', { audience: [] }), 'FetchJWTSVID without an audience')
  await refused(grpc.status.PERMISSION_DENIED, unary('FetchJWTSVID', { audience: ['a'], spiffe_id: domain + '/not/mine' }), "FetchJWTSVID for another's ID")
}

async function identity() {
  const [first, second] = (await stream('FetchX509SVID', 2)).map(checkX509)
  assert.notEqual(first.serial, second.serial)
  assert.notEqual(first.key, second.key)
  console.log('ok X.509-SVID', id, 'and its rotation')
  await mutual(second)
  console.log('ok mutual TLS')
  const [{ bundles }] = await stream('FetchX509Bundles')
  assert.equal(certificates(bundles['spiffe://' + new URL(id).host]).map(String).join(''), second.ca)
  console.log('ok bundles')
  await jwt()
}

const run = { denied, identity }[what]
run().then(() => { console.log('done'); process.exit(0) }, e => { console.error(e); process.exit(1) })
