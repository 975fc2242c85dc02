// A consumer of JWT-SVIDs that knows nothing of SPIFFE: jose, with the issuer's discovery document and the keys that it leads to.
//
//   node oidc.js ISSUER AUDIENCE    tokens on standard input, one a line; says of each "ok SUBJECT" or "refused CODE"
'use strict'
const assert = require('node:assert/strict')
const readline = require('node:readline')

globalThis.crypto ??= require('node:crypto').webcrypto // before Node 20

async function main(issuer, audience) {
  const { createRemoteJWKSet, jwtVerify } = await import('jose')
  const found = await (await fetch(issuer + '/.well-known/openid-configuration')).json()
  assert.equal(found.issuer, issuer)
  const keys = createRemoteJWKSet(new URL(found.jwks_uri))
  for await (const token of readline.createInterface({ input: process.stdin })) {
    try {
      const { payload } = await jwtVerify(token, keys, { issuer, audience, algorithms: found.id_token_signing_alg_values_supported, requiredClaims: ['exp', 'sub'] })
      console.log('ok', payload.sub)
    } catch (err) {
      console.log('refused', err.code ?? err.message)
    }
  }
  console.log('done')
}

main(...process.argv.slice(2)).catch(err => { console.error(err); process.exit(1) })
